"""Linear probe: multinomial logistic regression on frozen features (Radford et al. 2021, appendix A.3)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from mmfoundry.evals.embed import embed_pictures
from mmfoundry.evals.metrics import Floats, Ints, best_constant, mean, top_k_hits
from mmfoundry.evals.samples import class_indices, clusters_of
from mmfoundry.evals.task import EVAL_TASKS, Bench, EvalTask, Row, Selection, TaskResult
from mmfoundry.pipeline.errors import ConfigError

# What the sweep tries; features have unit length, so strengths much above 1e-1 forbid any fit at all.
L2_SWEEP = tuple(10.0**exponent for exponent in range(-6, 0))
VALIDATION_FRACTION = 0.2
MAX_ITERATIONS = 200


def fit(features: Floats, target: Ints, num_classes: int, l2: float) -> tuple[Floats, Floats]:
    """Minimise mean cross-entropy + l2 / 2 * |weights|^2 by full-batch L-BFGS; the bias is not penalised.

    The same problem as sklearn's `LogisticRegression(C=1 / (l2 * n))`, in float64, from zeros: no randomness.

    Args:
        features: (n, D).
        target: (n,) class indices.
        num_classes: classes in all, also those without a sample.
        l2: strength of the penalty.

    Returns:
        weights (classes, D), bias (classes,).
    """
    # Embeddings of one tower lie in a narrow cone, which makes the plain problem slow to solve. Centred and scaled it
    # is the same problem: the bias takes up the centre, and the penalty is scaled along.
    x = torch.from_numpy(np.asarray(features, np.float64))
    centre = x.mean(dim=0)
    spread = float((x - centre).square().sum(dim=1).mean().sqrt()) or 1.0
    x = (x - centre) / spread
    y = torch.from_numpy(np.asarray(target, np.int64))
    weights = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, bias], max_iter=MAX_ITERATIONS, tolerance_grad=1e-7, line_search_fn="strong_wolfe", history_size=20
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weights.T + bias, y) + l2 / (2 * spread**2) * weights.square().sum()
        loss.backward()
        return loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny products: threads only wait for each other
    try:
        with torch.enable_grad():
            solver.step(closure)
    finally:
        torch.set_num_threads(threads)
    fitted = weights.detach() / spread
    return fitted.numpy(), (bias.detach() - fitted @ centre).numpy()


def choose_l2(features: Floats, target: Ints, num_classes: int, seed: int, sweep: Sequence[float] = L2_SWEEP) -> float:
    """The strength with the lowest cross-entropy on a held-out fifth of the training samples."""
    order = np.random.default_rng(seed).permutation(len(target))
    num_validation = max(1, round(VALIDATION_FRACTION * len(target)))
    held, kept = order[:num_validation], order[num_validation:]

    def loss(l2: float) -> float:
        weights, bias = fit(features[kept], target[kept], num_classes, l2)
        logits = torch.from_numpy(np.asarray(features[held], np.float64) @ weights.T + bias)
        return float(F.cross_entropy(logits, torch.from_numpy(np.asarray(target[held], np.int64))))

    return min(sweep, key=loss)


def probe_scores(train: Floats, target: Ints, test: Floats, num_classes: int, l2: float | None, seed: int) -> Floats:
    """Logits (n, classes) of a probe fitted on `train` for `test`; `l2` None sweeps it on the training samples."""
    strength = choose_l2(train, target, num_classes, seed) if l2 is None else l2
    weights, bias = fit(train, target, num_classes, strength)
    return np.asarray(test, np.float64) @ weights.T + bias


@EVAL_TASKS.register("linear_probe")
class LinearProbe(EvalTask):
    """How much of a label can be read off frozen picture embeddings by a linear classifier."""

    needs: ClassVar[Literal["clip", "vlm"]] = "clip"

    train: Selection = Field(description="pictures that the probe is fitted on")
    test: Selection = Field(description="pictures that it is scored on")
    label: str = Field(description="metadata field that holds the class name")
    l2: float | None = Field(None, ge=0, description="weight penalty; null: swept on a fifth of `train`")
    cluster_by: str | None = Field(
        None, description="metadata field; samples that share it (styles of one concept) are resampled together"
    )

    def run(self, name: str, bench: Bench) -> TaskResult:
        """Fit on the embeddings of `train`, score on those of `test`."""
        train, test = bench.open(self.train), bench.open(self.test)
        train_labels, test_labels = ([str(label) for label in part.field(self.label)] for part in (train, test))
        names, indices = class_indices([*train_labels, *test_labels])
        target, truth = indices[: len(train_labels)], indices[len(train_labels) :]
        if len(set(target.tolist())) < 2:
            raise ConfigError(f"{name}: `train` has one class only ({names[0]}); a probe needs two or more")
        guesses = {}
        for which, clip in bench.clips().items():
            features = [embed_pictures(clip, part, bench.runtime, bench.batch_size) for part in (train, test)]
            guesses[which] = probe_scores(features[0], target, features[1], len(names), self.l2, bench.seed)
        hits = {which: top_k_hits(scores, truth, 1) for which, scores in guesses.items()}
        row = Row.of(
            name,
            name,
            mean(hits["trained"], clusters=clusters_of(test, self.cluster_by), seed=bench.seed),
            chance=1 / len(names),
            untrained=float(hits["untrained"].mean()) if "untrained" in hits else None,
            constant=best_constant(truth),
        )
        predictions = [
            {"key": test.key(i), "label": test_labels[i], "top": [names[int(guesses["trained"][i].argmax())]]}
            for i in range(len(test))
        ]
        return TaskResult([row], predictions)
