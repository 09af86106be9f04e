"""What every evaluation counts, and how sure the count is: functions over numpy arrays, no model, no file.

A number without an interval invites stories about noise, so each metric here is a statistic of per-sample weights:
with all weights one it is the metric, with resampled weights it is one draw of its bootstrap distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]
Statistic = Callable[[Floats], Floats]  # weights (resamples, n) -> values (resamples,)

RESAMPLES = 1000
CONFIDENCE = 0.95
# Bounds the memory of one block of resampled weights: 8 bytes x 2 million = 16 MB.
BLOCK_WEIGHTS = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A metric with its percentile bootstrap interval; `n` counts the samples (not the clusters) behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    statistic: Statistic,
    n: int,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Percentile bootstrap of any weighted statistic (Efron 1979).

    Args:
        statistic: weights (resamples, n) float64 to values (resamples,).
        n: number of samples.
        clusters: one label a sample; samples that share a label (questions about one picture) are drawn together,
            since their errors are not independent. None draws samples one by one.
        seed: of the draws; the same seed gives the same interval.
        resamples: how many draws.
        confidence: mass of the interval, in (0, 1).

    Raises:
        ValueError: no samples, or `clusters` is not one label a sample.
    """
    if n < 1:
        raise ValueError("cannot estimate a metric from no samples")
    if clusters is None:
        member = np.arange(n)
    elif len(clusters) == n:
        label_to_row = {label: row for row, label in enumerate(dict.fromkeys(clusters))}
        member = np.array([label_to_row[label] for label in clusters])
    else:
        raise ValueError(f"{len(clusters)} cluster labels for {n} samples")
    value = float(statistic(np.ones((1, n)))[0])
    rng = np.random.default_rng(seed)
    num_clusters = int(member.max()) + 1
    block = max(1, BLOCK_WEIGHTS // n)
    draws = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        weights = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=rows)
        draws.append(statistic(weights[:, member].astype(np.float64)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n)


def ratio_of_sums(numerator: Floats | Bools, denominator: Floats | Bools) -> Statistic:
    """Weighted sum(numerator) / sum(denominator); 0 where the denominator is 0. Mean, precision, recall and F1 are."""
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)

    def statistic(weights: Floats) -> Floats:
        over = weights @ bottom
        return np.divide(weights @ top, over, out=np.zeros_like(over), where=over > 0)

    return statistic


def mean(values: Floats | Bools, *, clusters: Sequence[object] | None = None, seed: int = 0) -> Estimate:
    """The mean of `values` (n,) with its interval; accuracy when `values` are hits."""
    return bootstrap(ratio_of_sums(values, np.ones(len(values))), len(values), clusters=clusters, seed=seed)


def difference(
    after: Floats | Bools, before: Floats | Bools, *, clusters: Sequence[object] | None = None, seed: int = 0
) -> Estimate:
    """Mean of `after - before` over the same samples, paired: narrower and fairer than comparing two intervals.

    Raises:
        ValueError: the two do not pair sample by sample.
    """
    if len(after) != len(before):
        raise ValueError(f"{len(after)} and {len(before)} values do not pair sample by sample")
    return mean(np.asarray(after, np.float64) - np.asarray(before, np.float64), clusters=clusters, seed=seed)


def require_finite(scores: Floats, name: str) -> None:
    """A comparison with NaN is false, which would count as 'nothing scored higher': refuse instead."""
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} has {int((~np.isfinite(scores)).sum())} values that are not finite numbers")


def top_k_hits(scores: Floats, target: Ints, k: int) -> Bools:
    """Whether the target class is among the k highest of its row.

    Ties count against the target (a class that scores the same is placed before it), so that a model which scores
    all classes alike gets 0 and not 1, on every machine; without ties it is CLIP_benchmark's and torch.topk's answer.

    Args:
        scores: (n, classes).
        target: (n,) class indices.
        k: how many classes may be named.

    Returns:
        (n,) bool.

    Raises:
        ValueError: a score is not finite.
    """
    require_finite(scores, "scores")
    own = scores[np.arange(len(scores)), target]
    at_least_own = (scores >= own[:, None]).sum(axis=1)  # counts the target itself
    return at_least_own <= k


def mean_per_class_recall(hits: Bools, target: Ints) -> Statistic:
    """Recall averaged over the classes present (CLIP_benchmark's `mean_per_class_recall`, sklearn's balanced accuracy).

    Args:
        hits: (n,) whether the top-1 class was right.
        target: (n,) class indices.
    """
    one_hot = (np.asarray(target)[:, None] == np.unique(target)[None, :]).astype(np.float64)
    hit_one_hot = one_hot * np.asarray(hits, np.float64)[:, None]

    def statistic(weights: Floats) -> Floats:
        present, right = weights @ one_hot, weights @ hit_one_hot
        recall = np.divide(right, present, out=np.full_like(present, np.nan), where=present > 0)
        return np.nanmean(recall, axis=1)

    return statistic


def best_constant(target: Sequence[object] | Ints, k: int = 1) -> float:
    """Accuracy of the best answer that ignores the picture: the share of the k most frequent targets."""
    _, counts = np.unique(np.asarray(target), return_counts=True)
    return float(np.sort(counts)[::-1][:k].sum() / counts.sum())


def chance_of_any(population: int, right: int, draws: int) -> float:
    """Chance that at least one of `draws` different items, picked blindly out of `population`, is a right one."""
    if draws > population - right:
        return 1.0
    return 1 - comb(population - right, draws) / comb(population, draws)
