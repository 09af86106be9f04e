"""Image-text retrieval: recall at k with several captions a picture, as CLIP_benchmark counts it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from mmfoundry.evals.embed import embed_pictures, embed_texts
from mmfoundry.evals.metrics import Bools, Floats, Ints, chance_of_any, mean, require_finite
from mmfoundry.evals.samples import Samples
from mmfoundry.evals.task import EVAL_TASKS, Bench, EvalTask, Example, Row, Selection, TaskResult
from mmfoundry.pipeline.errors import DamagedInput

NUM_EXAMPLES = 6
NUM_SHOWN = 5
QUERY_BLOCK = 1024


def rank_of_best_positive(scores: Floats, positive: Bools) -> Ints:
    """How many wrong items come before the first right one, for each query.

    A wrong item that scores the same as the best right one counts as before it: ties never help, and the answer does
    not depend on the order of items. A query is a hit at k when its rank is below k, which without ties is
    CLIP_benchmark's `image_retrieval_recall@k` and `text_retrieval_recall@k` (any of the right items in the top k).

    Args:
        scores: (queries, items), higher is nearer.
        positive: (queries, items), True where the item is right for the query.

    Returns:
        (queries,) ranks from 0.

    Raises:
        ValueError: a query has no right item, or a score is not finite.
    """
    require_finite(scores, "scores")
    if not positive.any(axis=1).all():
        raise ValueError(f"query {int(np.argmin(positive.any(axis=1)))} has no right item")
    best = np.where(positive, scores, -np.inf).max(axis=1)
    return ((scores >= best[:, None]) & ~positive).sum(axis=1)


def ranks_in_blocks(queries: Floats, items: Floats, positive: Bools) -> Ints:
    """`rank_of_best_positive` of `queries @ items.T`, whose float scores are never held whole."""
    blocks = [slice(start, start + QUERY_BLOCK) for start in range(0, len(queries), QUERY_BLOCK)]
    return np.concatenate([rank_of_best_positive(queries[block] @ items.T, positive[block]) for block in blocks])


@dataclass(frozen=True)
class CaptionSet:
    """Pictures and the different captions among them.

    The same words under two pictures are one caption, right for both: to tell the two apart is not possible.

    Attributes:
        texts: the different captions.
        right: (pictures, texts) bool, whether the text is a caption of the picture.
        query_text, query_picture: (queries,) one caption query for each caption of each picture.
    """

    texts: list[str]
    right: Bools
    query_text: Ints
    query_picture: Ints

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> "CaptionSet":
        """From the captions of each picture."""
        index: dict[str, int] = {}
        pairs = [(row, index.setdefault(text, len(index))) for row, texts in enumerate(captions) for text in texts]
        query_picture, query_text = np.array(pairs).T
        right = np.zeros((len(captions), len(index)), dtype=np.bool_)
        right[query_picture, query_text] = True
        return cls(list(index), right, query_text, query_picture)

    def ranks(self, direction: str, pictures: Floats, sentences: Floats) -> Ints:
        """Rank of the best right item of each query of `image_to_text` or `text_to_image`."""
        if direction == "image_to_text":
            return ranks_in_blocks(pictures, sentences, self.right)
        return ranks_in_blocks(sentences, pictures, self.right.T)[self.query_text]

    def baselines(self, direction: str, k: int) -> dict[str, float]:
        """What k items picked blindly score in expectation, and a bound on what any fixed k items can."""
        right = self.right if direction == "image_to_text" else self.right.T[self.query_text]
        num_right = right.sum(axis=1)
        chance = np.mean([chance_of_any(right.shape[1], int(n), k) for n in num_right])
        # No fixed list hits more queries than its items have together.
        constant = min(1.0, np.sort(right.sum(axis=0))[::-1][:k].sum() / len(right))
        return {"chance": float(chance), "constant": float(constant)}


@EVAL_TASKS.register("retrieval")
class Retrieval(EvalTask):
    """Captions of a picture and the picture of a caption among all others: recall at k both ways."""

    needs: ClassVar[Literal["clip", "vlm"]] = "clip"

    scenes: Selection = Field(description="pictures with captions")
    ks: list[int] = Field([1, 5, 10], min_length=1, description="values of k in recall at k")
    max_captions: int = Field(5, ge=1, description="captions used a picture, the first ones")
    prefix: str = Field("", description="put before the metric names, for a second retrieval set")

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Retrieve both ways among all pictures and all captions."""
        samples = bench.open(self.scenes)
        captions = [texts[: self.max_captions] for texts in samples.captions]
        if not all(captions):
            raise DamagedInput(f"{name}: sample {samples.key([bool(c) for c in captions].index(False))} has no caption")
        pairs = CaptionSet.of(captions)
        embedded = {
            which: (embed_pictures(clip, samples, bench.runtime, bench.batch_size), embed_texts(clip, pairs.texts))
            for which, clip in bench.clips().items()
        }
        rows: list[Row] = []
        for direction in ("image_to_text", "text_to_image"):
            ranks = {which: pairs.ranks(direction, *both) for which, both in embedded.items()}
            # captions of one picture rise and fall together
            clusters = pairs.query_picture.tolist() if direction == "text_to_image" else None
            for k in self.ks:
                estimate = mean(ranks["trained"] < k, clusters=clusters, seed=bench.seed)
                untrained = float((ranks["untrained"] < k).mean()) if "untrained" in ranks else None
                metric = f"{self.prefix}{direction}_r{k}"
                rows.append(Row.of(name, metric, estimate, untrained=untrained, **pairs.baselines(direction, k)))
        return TaskResult(rows, *_look(samples, captions, pairs, *embedded["trained"], bench.seed))


def _look(
    samples: Samples, captions: list[list[str]], pairs: CaptionSet, pictures: Floats, sentences: Floats, seed: int
) -> tuple[list[dict], list[Example]]:
    """Predictions of both directions, and examples: a picture with the captions found, a caption with the pictures."""
    found_texts = np.argsort(-(pictures @ sentences.T), axis=1, kind="stable")[:, :NUM_SHOWN]
    first_caption = [pairs.texts.index(texts[0]) for texts in captions]
    found_pictures = np.argsort(-(sentences[first_caption] @ pictures.T), axis=1, kind="stable")[:, :NUM_SHOWN]
    predictions = [
        {
            "key": samples.key(row),
            "captions": captions[row],
            "found_captions": [pairs.texts[i] for i in found_texts[row]],
            "found_pictures": [samples.key(int(i)) for i in found_pictures[row]],
        }
        for row in range(len(samples))
    ]
    chosen = np.random.default_rng(seed).permutation(len(samples))[: 2 * NUM_EXAMPLES].tolist()
    examples = []
    for row in chosen[:NUM_EXAMPLES]:
        own = pairs.right[row, found_texts[row]]
        ticked = [
            f"{text} ✓" if hit else text for text, hit in zip(predictions[row]["found_captions"], own, strict=True)
        ]
        found = {"captions found": ticked, "its own caption": captions[row][0]}
        examples.append(Example([samples.picture(row)], bool(own[0]), found))
    for row in chosen[NUM_EXAMPLES:]:
        marked = pairs.right[found_pictures[row], first_caption[row]].tolist()
        shown = [samples.picture(int(i)) for i in found_pictures[row]]
        examples.append(Example(shown, marked[0], {"pictures found for": captions[row][0]}, marked))
    return predictions, examples
