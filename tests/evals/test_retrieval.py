"""Retrieval against CLIP_benchmark's own output and a definition written out with sets."""

import numpy as np
import pytest

from mmfoundry.evals.retrieval import CaptionSet, rank_of_best_positive


def peer_case() -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    rs = np.random.RandomState(7)
    pictures = rs.randn(60, 16)
    owner = np.repeat(np.arange(60), rs.randint(1, 6, 60))
    texts = pictures[owner] + 2.5 * rs.randn(len(owner), 16)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return pictures, texts, [[str(i) for i in np.flatnonzero(owner == row)] for row in range(60)]


# text_retrieval_recall@k and image_retrieval_recall@k of CLIP_benchmark 1.6.2 for these embeddings
PEER = {
    "image_to_text": {1: 0.25, 5: 0.5833333134651184, 10: 0.7166666388511658},
    "text_to_image": {1: 0.234375, 5: 0.5260416865348816, 10: 0.7395833134651184},
}


@pytest.mark.parametrize("direction", PEER)
def test_recall_equals_clip_benchmark(direction: str) -> None:
    pictures, texts, captions = peer_case()
    ranks = CaptionSet.of(captions).ranks(direction, pictures, texts)
    for k, expected in PEER[direction].items():
        assert (ranks < k).mean() == pytest.approx(expected, abs=1e-6)  # the peer's mean is fp32


def test_rank_is_the_definition_with_sets() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=(40, 30)), rng.random((40, 30)) < 0.1
    positive[np.arange(40), rng.integers(30, size=40)] = True
    ranks = rank_of_best_positive(scores, positive)
    for k in (1, 3, 10):
        for row in range(40):
            nearest = set(np.argsort(-scores[row])[:k].tolist())
            assert (ranks[row] < k) == bool(nearest & set(np.flatnonzero(positive[row]).tolist()))


def test_a_model_that_scores_everything_alike_finds_nothing() -> None:
    positive = np.eye(20, dtype=bool)
    assert (rank_of_best_positive(np.full((20, 20), 0.5), positive) == 19).all()


def test_same_words_under_two_pictures_are_right_for_both() -> None:
    pairs = CaptionSet.of([["a dog", "a pet"], ["a dog"], ["a cat"]])
    assert pairs.texts == ["a dog", "a pet", "a cat"]
    pictures = np.eye(3)
    sentences = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert pairs.ranks("image_to_text", pictures, sentences).tolist() == [0, 0, 0]
    assert pairs.ranks("text_to_image", pictures, sentences).tolist() == [0, 0, 0, 0]


def test_baselines_bound_what_fixed_answers_and_guesses_score() -> None:
    rng = np.random.default_rng(5)
    pairs = CaptionSet.of([[f"{row} {i}" for i in range(5)] for row in range(40)])
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5):
            expected = pairs.baselines(direction, k)
            blind = []
            for _ in range(60):
                ranks = pairs.ranks(direction, rng.normal(size=(40, 8)), rng.normal(size=(200, 8)))
                blind.append((ranks < k).mean())
            assert np.mean(blind) == pytest.approx(expected["chance"], abs=0.02)
            assert expected["constant"] == pytest.approx(k / 40)


def test_queries_without_an_answer_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="query 1 has no right item"):
        rank_of_best_positive(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="not finite"):
        rank_of_best_positive(np.array([[np.nan]]), np.array([[True]]))
