"""`text_based`: the caption is English and names something that ImageNet-21k has pictures of."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
from pydantic import Field

from mmfoundry.data.derived.captions import each_once, words_of
from mmfoundry.data.filters.base import FILTERS, Filter
from mmfoundry.data.filters.basic import Language
from mmfoundry.data.filters.combine import All
from mmfoundry.data.wordnet import WordNet, find_wordnet, imagenet21k_file, load_wordnet, read_synset_ids

_ROWS_AT_ONCE = 1 << 16  # whose words are looked up together


@FILTERS.register("names_entity")
class NamesEntity(Filter):
    """A word of the caption has one of the wanted synsets as its first in WordNet."""

    wordnet: Path | None = Field(None, description="folder with index.noun; null looks where Debian and NLTK put it")
    synsets: Path | None = Field(None, description="file of synset ids, one a line; null for ImageNet-21k's, from timm")

    def files(self) -> tuple[Path, ...]:
        """What the verdicts depend on besides the columns."""
        return find_wordnet(self.wordnet), self.synsets or imagenet21k_file()

    def columns(self) -> frozenset[str]:
        """The caption."""
        return frozenset({"caption"})

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """True where a word names one; null without a caption."""
        captions = table["caption"]
        if captions.null_count() == len(captions):  # then WordNet need not be there
            return pl.Series("keep", [], dtype=pl.Boolean).extend_constant(None, len(captions))
        entities = _entities(*self.files())
        each, places = each_once(captions)
        starts = range(0, len(each), _ROWS_AT_ONCE)
        named = pl.concat([entities.named_in(each[row : row + _ROWS_AT_ONCE]) for row in starts])
        return named.gather(places).alias("keep")


@FILTERS.register("text_based")
class TextBased(Filter):
    """The caption is English and a word of it has its first WordNet synset among ImageNet-21k's.

    DataComp (Gadre et al. 2023, arXiv 2304.14108, `text_based` baseline): "a text filter captions that contain words
    from the ImageNet-21k synsets". Words are split at white space and looked up as they stand, punctuation and all; a
    synset is told by its offset alone, so a verb's may be taken for the noun's of that number, as it is there. English
    is fastText's first guess, asked for only where the caption names something.
    """

    languages: list[str] = Field(["en"], min_length=1, description="codes as fastText's lid.176 gives them")
    wordnet: Path | None = Field(None, description="folder with index.noun; null looks where Debian and NLTK put it")
    synsets: Path | None = Field(None, description="file of synset ids, one a line; null for ImageNet-21k's, from timm")

    def files(self) -> tuple[Path, ...]:
        """What the verdicts depend on besides the columns."""
        return NamesEntity(wordnet=self.wordnet, synsets=self.synsets).files()

    def columns(self) -> frozenset[str]:
        """Caption and language."""
        return frozenset({"caption", "language"})

    def keep(self, table: pl.DataFrame) -> pl.Series:
        """One rule after the other."""
        return All(filters=tuple(part for _, part in self.parts())).keep(table)

    def parts(self) -> tuple[tuple[str, Filter], ...]:
        """The two rules by name, the cheap one first."""
        return (
            ("text_based.names_entity", NamesEntity(wordnet=self.wordnet, synsets=self.synsets)),
            ("text_based.language", Language(languages=self.languages)),
        )


class _Entities:
    """Which words name a wanted synset; each word is looked up once."""

    def __init__(self, wordnet: WordNet, wanted: frozenset[int]) -> None:
        self._wordnet = wordnet
        self._wanted = wanted
        self._known: dict[str, bool] = {}

    def named_in(self, captions: pl.Series) -> pl.Series:
        """Whether a word of each caption does; none is null."""
        words, rows = words_of(captions)
        names = [word for word in words.unique().to_list() if self._names(word)]
        named = np.zeros(len(captions), bool)
        named[rows[words.is_in(names).to_numpy()]] = True
        return pl.Series(named)

    def _names(self, word: str) -> bool:
        known = self._known.get(word)
        if known is None:
            known = self._wordnet.first_synset(word) in self._wanted
            if len(self._known) < 1 << 20:  # a pool's rare words would fill the memory
                self._known[word] = known
        return known


@lru_cache(maxsize=1)
def _entities(wordnet: Path, synsets: Path) -> _Entities:
    return _Entities(load_wordnet(wordnet), read_synset_ids(synsets))
