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
    """Share of pictures whose caption scores above every one of its hard negatives, and above each alone."""

    needs: ClassVar[Literal["clip", "vlm"]] = "clip"

    scenes: Selection = Field(description="pictures with captions and `hard_negatives` in their JSON")

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Compare the first caption of each picture with its hard negatives."""
        samples = bench.open(self.scenes)
        negatives = [_texts(samples, row) for row in range(len(samples))]
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


def _texts(samples: Samples, row: int) -> list[str]:
    """The hard negatives of one sample, without any that is one of its true captions."""
    given: Any = samples.meta[row].get("hard_negatives", [])
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise DamagedInput(f"sample {samples.key(row)}: hard_negatives is not a list of strings")
    return [text for text in given if text not in samples.captions[row]]


def _example(samples: Samples, row: int, prediction: dict) -> Example:
    margins = prediction["margins"]
    worst = int(np.argmin(margins))
    return Example(
        [samples.picture(row)],
        margins[worst] > 0,
        {"caption": prediction["caption"], "nearest wrong one": prediction["hard_negatives"][worst]},
    )
