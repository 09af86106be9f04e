"""The probe against sklearn's solution of the same problem."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mmfoundry.evals.linear_probe import choose_l2, fit, probe_scores


def clouds(n: int, classes: int, width: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    target = rng.integers(classes, size=n)
    features = centres[target] + noise * rng.normal(size=(n, width))
    return features / np.linalg.norm(features, axis=1, keepdims=True), target


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_fit_is_sklearns_solution(l2: float) -> None:
    features, target = clouds(150, 4, 12, noise=1.0)
    weights, bias = fit(features, target, 4, l2)
    peer = LogisticRegression(C=1 / (l2 * len(target)), tol=1e-10, max_iter=10_000).fit(features, target)
    np.testing.assert_allclose(weights, peer.coef_, atol=2e-3 * np.abs(peer.coef_).max())
    # only differences of biases matter to the softmax
    np.testing.assert_allclose(bias - bias.mean(), peer.intercept_ - peer.intercept_.mean(), atol=5e-3)


def test_sweep_prefers_a_strong_penalty_for_noise_and_a_weak_one_for_signal() -> None:
    noise = np.random.default_rng(1).normal(size=(120, 40))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    labels = np.random.default_rng(2).integers(3, size=120)
    clean, target = clouds(120, 3, 40, noise=0.05)
    assert choose_l2(noise, labels, 3, seed=0) >= 1e-2
    assert choose_l2(clean, target, 3, seed=0) <= 1e-4


def test_probe_reads_off_what_is_there_and_nothing_else() -> None:
    train, target = clouds(200, 5, 16, noise=0.3)
    test, truth = clouds(200, 5, 16, noise=0.3, seed=1)
    assert (probe_scores(train, target, test, 5, None, 0).argmax(1) == truth).mean() > 0.95
    shuffled = np.random.default_rng(0).permutation(target)
    assert (probe_scores(train, shuffled, test, 5, None, 0).argmax(1) == truth).mean() < 0.5
