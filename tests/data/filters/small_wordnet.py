"""A WordNet of a few words, in the files that Debian and NLTK carry, with true offsets."""

from pathlib import Path

WORDS = {
    "noun": {
        "dog": ("dog", "chap"),
        "chap": ("chap",),
        "church": ("church",),
        "man": ("man",),
        "woman": ("woman",),
        "running": ("running",),
        "run": ("run",),
        "knife": ("knife",),
        "bus": ("bus",),
        "city": ("city",),
        "glass": ("glass", "glasses"),
        "glasses": ("glasses",),
        "wa": ("wa",),
        "beach": ("beach",),
        "hill": ("hill",),
        "house": ("house",),
    },
    "verb": {"run": ("run",), "be": ("be",), "bake": ("bake",), "try": ("try",), "dog": ("dog",), "walk": ("walk",)},
    "adj": {"big": ("big",), "nice": ("nice",), "good": ("good",), "red": ("red",)},
    "adv": {"quickly": ("quickly",), "well": ("well",)},
}
EXCEPTIONS = {
    "noun": {"women": ("woman",), "men": ("man",), "knives": ("knife",), "nobodies": ("nothing",)},
    "verb": {"was": ("be",), "ran": ("run",)},
    "adj": {"better": ("good", "well"), "biggest": ("big",)},
    "adv": {"better": ("well",)},
}
_LETTER = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
_LICENCE = "  1 This is not the WordNet of Princeton.  \n  2 WordNet 3.0 Copyright nobody\n"


def write_wordnet(folder: Path) -> Path:
    """Write index, data and exception files, and NLTK's list of lexicographer files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, words in WORDS.items():
        letter = _LETTER[part]
        names = sorted({name for meanings in words.values() for name in meanings})
        data, offsets = _LICENCE, {}
        for name in names:
            offsets[name] = len(data)
            data += f"{len(data):08d} 03 {letter} 01 {name} 0 000 | what {name} means  \n"
        index = _LICENCE
        for word, meanings in sorted(words.items()):
            places = " ".join(f"{offsets[name]:08d}" for name in meanings)
            index += f"{word} {letter} {len(meanings)} 1 @ {len(meanings)} 0 {places}  \n"
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)
        lines = [" ".join([form, *lemmas]) for form, lemmas in EXCEPTIONS[part].items()]
        (folder / f"{part}.exc").write_text("".join(line + "\n" for line in sorted(lines)))
    (folder / "lexnames").write_text("".join(f"{number:02d}\tsome.thing\t1\n" for number in range(45)))
    return folder


def offset_of(folder: Path, part: str, name: str) -> int:
    """Where the synset of this name begins."""
    line = next(line for line in (folder / f"data.{part}").read_text().split("\n") if f" {name} 0 " in line)
    return int(line.split()[0])
