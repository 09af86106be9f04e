"""Metrics against CLIP_benchmark's own output, sklearn and closed forms; intervals against theory."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score

from mmfoundry.evals import metrics
from mmfoundry.evals.pope import pope_scores


def peer_case() -> tuple[np.ndarray, np.ndarray]:
    rs = np.random.RandomState(11)
    scores, target = rs.randn(200, 12), rs.randint(0, 9, 200)
    scores[np.arange(200), target] += 1.2
    return scores, target


def test_accuracy_and_recall_equal_clip_benchmark() -> None:
    scores, target = peer_case()
    # acc1, acc5, mean_per_class_recall that CLIP_benchmark 1.6.2 gives for these scores (classes 9-11 have no sample)
    assert metrics.top_k_hits(scores, target, 1).mean() == pytest.approx(0.37)
    assert metrics.top_k_hits(scores, target, 5).mean() == pytest.approx(0.855)
    statistic = metrics.mean_per_class_recall(metrics.top_k_hits(scores, target, 1), target)
    assert statistic(np.ones((1, 200)))[0] == pytest.approx(0.37396622906680377, abs=1e-12)
    seen = scores[:, :9]  # sklearn warns of guesses that are no target
    hits = metrics.top_k_hits(seen, target, 1)
    ours = metrics.mean_per_class_recall(hits, target)(np.ones((1, 200)))[0]
    assert ours == pytest.approx(balanced_accuracy_score(target, seen.argmax(1)))


def test_ties_never_help() -> None:
    same = np.zeros((6, 5))
    assert not metrics.top_k_hits(same, np.arange(6) % 5, 4).any()
    assert metrics.top_k_hits(same, np.arange(6) % 5, 5).all()


def test_nan_is_refused_and_not_a_hit() -> None:
    with pytest.raises(ValueError, match="not finite"):
        metrics.top_k_hits(np.array([[np.nan, 0.0]]), np.array([0]), 1)


def test_bootstrap_interval_is_that_of_the_binomial() -> None:
    hits = np.arange(400) < 120
    estimate = metrics.mean(hits, seed=3)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert estimate.value == pytest.approx(0.3)
    # a percentile of 1,000 draws is off by about 0.05 standard deviations
    assert estimate.low == pytest.approx(0.3 - half, abs=0.006)
    assert estimate.high == pytest.approx(0.3 + half, abs=0.006)
    assert estimate == metrics.mean(hits, seed=3)


def test_clusters_widen_the_interval() -> None:
    per_picture = np.random.default_rng(0).random(100) < 0.5
    hits = np.repeat(per_picture, 9)  # nine questions about a picture, all right or all wrong: 100 facts, not 900
    alone = metrics.mean(hits)
    together = metrics.mean(hits, clusters=np.repeat(np.arange(100), 9).tolist())
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(3, rel=0.15)
    assert together.value == alone.value
    assert together.n == 900


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for trial in range(200):
        estimate = metrics.mean(rng.random(150) < 0.7, seed=trial)
        covered.append(estimate.low <= 0.7 <= estimate.high)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_paired_difference_is_narrower() -> None:
    rng = np.random.default_rng(2)
    before = rng.random(300) < 0.5
    after = before | (rng.random(300) < 0.1)
    paired = metrics.difference(after, before)
    assert paired.low > 0
    assert paired.high - paired.low < metrics.mean(after).high - metrics.mean(before).low - paired.value
    with pytest.raises(ValueError, match="pair"):
        metrics.difference(after, before[:-1])


@pytest.mark.parametrize("yes_share", [0.0, 0.3, 1.0])
def test_pope_scores_equal_sklearn(yes_share: float) -> None:
    rng = np.random.default_rng(4)
    is_yes = rng.random(300) < 0.5
    said_yes = rng.random(300) < yes_share
    scores = pope_scores(said_yes, is_yes)
    assert scores["accuracy"].value == pytest.approx((said_yes == is_yes).mean())
    assert scores["precision"].value == pytest.approx(precision_score(is_yes, said_yes, zero_division=0))
    assert scores["recall"].value == pytest.approx(recall_score(is_yes, said_yes))
    assert scores["f1"].value == pytest.approx(f1_score(is_yes, said_yes))
    assert scores["yes_ratio"].value == pytest.approx(said_yes.mean())
    assert all(each.low <= each.value <= each.high for each in scores.values())


def test_baselines() -> None:
    assert metrics.best_constant(np.array([0, 0, 0, 1, 1, 2])) == pytest.approx(0.5)
    assert metrics.best_constant(["a", "b", "b", "c"], k=2) == pytest.approx(0.75)
    # two right ones among five: drawing two misses both in 3/10 of the cases
    assert metrics.chance_of_any(5, 2, 2) == pytest.approx(0.7)
    assert metrics.chance_of_any(5, 2, 4) == 1.0
    drawn = [np.random.default_rng(i).permutation(40)[:5].min() < 3 for i in range(3000)]
    assert metrics.chance_of_any(40, 3, 5) == pytest.approx(np.mean(drawn), abs=0.03)
