"""Hard-negative captions: does a picture prefer its caption over almost the same words that are wrong for it?"""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mmfoundry.evals.embed import embed_pictures, embed_texts
from mmfoundry.evals.metrics import Bools, mean, require_finite
from mmfoundry.evals.samples import Samples
from mmfoundry.evals.task import EVAL_TASKS, Bench, Clip, EvalTask, Example, Row, Selection, TaskResult
from mmfoundry.pipeline.errors import DamagedInput

NUM_EXAMPLES = 12


@EVAL_TASKS.register("hard_negatives")
class HardNegatives(EvalTask):
    """Share of pictures whose caption scores above all of its hard negatives, and above each alone, by kind."""

    needs: ClassVar[Literal["clip", "vlm"]] = "clip"

    scenes: Selection = Field(description="pictures with captions and `hard_negatives` in their JSON")

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Compare the first caption of each picture with its hard negatives."""
        samples = bench.open(self.scenes)
        given = [read_negatives(samples, row) for row in range(len(samples))]
        negatives = [[text for text, _ in pairs] for pairs in given]
        kept = [row for row, texts in enumerate(negatives) if texts]
        if not kept:
            raise DamagedInput(f"{name}: no sample has hard negatives")
        margins = {which: self._margins(clip, samples, negatives, bench) for which, clip in bench.clips().items()}
        num = np.array([len(negatives[row]) for row in kept])
        whole = {which: np.array([parts[row].min() > 0 for row in kept]) for which, parts in margins.items()}
        pairs = {which: np.concatenate([parts[row] > 0 for row in kept]) for which, parts in margins.items()}
        rows = [
            # A fixed place among unordered candidates is a blind guess, so the best constant answer scores as chance.
            self._row(name, name, whole, float((1 / (num + 1)).mean()), None, bench.seed),
            self._row(name, f"{name}_pairwise", pairs, 0.5, np.repeat(kept, num).tolist(), bench.seed),
        ]
        kinds = np.array([kind for row in kept for _, kind in given[row]])
        owner = np.repeat(kept, num)
        for kind in sorted(set(kinds.tolist()) - {""}):
            of_kind = {which: hits[kinds == kind] for which, hits in pairs.items()}
            clusters = owner[kinds == kind].tolist()
            rows.append(self._row(name, f"{name}_{kind}", of_kind, 0.5, clusters, bench.seed))
        predictions = [
            {
                "key": samples.key(row),
                "caption": samples.captions[row][0],
                "hard_negatives": negatives[row],
                "margins": margins["trained"][row].tolist(),
            }
            for row in kept
        ]
        chosen = np.random.default_rng(bench.seed).permutation(len(kept))[:NUM_EXAMPLES].tolist()
        return TaskResult(rows, predictions, [_example(samples, kept[i], predictions[i]) for i in chosen])

    def _margins(self, clip: Clip, samples: Samples, negatives: list[list[str]], bench: Bench) -> list[np.ndarray]:
        """By how much each picture's caption beats each of its hard negatives; a tie is 0 and so does not count."""
        pictures = embed_pictures(clip, samples, bench.runtime, bench.batch_size)
        own = embed_texts(clip, [captions[0] for captions in samples.captions])
        others = embed_texts(clip, [text for texts in negatives for text in texts])
        ends = np.cumsum([len(texts) for texts in negatives])
        parts = []
        for row, end in enumerate(ends):
            wrong = others[end - len(negatives[row]) : end]
            parts.append(pictures[row] @ own[row] - wrong @ pictures[row])
            require_finite(parts[-1], "margins")
        return parts

    def _row(
        self, name: str, metric: str, hits: dict[str, Bools], chance: float, clusters: list | None, seed: int
    ) -> Row:
        untrained = float(hits["untrained"].mean()) if "untrained" in hits else None
        estimate = mean(hits["trained"], clusters=clusters, seed=seed)
        return Row.of(name, metric, estimate, chance=chance, untrained=untrained, constant=chance)


def read_negatives(samples: Samples, row: int) -> list[tuple[str, str]]:
    """Text and kind ("" where kinds are not told) of one sample's hard negatives, without true captions of it.

    Raises:
        DamagedInput: `hard_negatives` or `hard_negative_kinds` is not a list of texts, or they do not pair.
    """
    meta = samples.meta[row]
    texts: Any = meta.get("hard_negatives", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DamagedInput(f"sample {samples.key(row)}: hard_negatives is not a list of texts")
    kinds: Any = meta.get("hard_negative_kinds", [""] * len(texts))
    if not isinstance(kinds, list) or len(kinds) != len(texts) or not all(isinstance(kind, str) for kind in kinds):
        raise DamagedInput(f"sample {samples.key(row)}: hard_negative_kinds is not one text for each hard negative")
    return [(text, kind) for text, kind in zip(texts, kinds, strict=True) if text not in samples.captions[row]]


def _example(samples: Samples, row: int, prediction: dict) -> Example:
    margins = prediction["margins"]
    worst = int(np.argmin(margins))
    return Example(
        [samples.picture(row)],
        margins[worst] > 0,
        {"caption": prediction["caption"], "nearest wrong one": prediction["hard_negatives"][worst]},
    )
