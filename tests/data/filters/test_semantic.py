"""`semantic_duplicate` against SemDeDup's rule, written out pair by pair."""

import numpy as np
import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mmfoundry.data.filters import semantic
from mmfoundry.data.filters.semantic import SemanticDuplicate, drop_similar, nearest_centroids, unit_vectors
from mmfoundry.pipeline.errors import MmfoundryError
from tests.data.filters.cutting import assert_cuts_do_not_matter, keep_in_parts
from tests.data.filters.rows import uid

WIDTH = 6


def pool(uids: list[int], embeddings: list[list[float] | None]) -> pl.DataFrame:
    return pl.DataFrame(
        {"uid": [uid(number) for number in uids], "b32_img": embeddings},
        schema={"uid": pl.String(), "b32_img": pl.List(pl.Float32())},
    )


@st.composite
def pools(draw: st.DrawFn) -> pl.DataFrame:
    """Directions around a few centres, of any length, some missing, some of one sample twice."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(4, 60))
    centres = rng.standard_normal((4, WIDTH))
    spread = draw(st.sampled_from([0.0, 0.1, 0.5]))
    vectors = centres[rng.integers(0, 4, count)] + spread * rng.standard_normal((count, WIDTH))
    vectors *= 2.0 ** rng.integers(-2, 5, (count, 1))  # exact: copies of other lengths stay copies
    embeddings: list[list[float] | None] = [row.tolist() for row in vectors]
    uids = rng.permutation(count).tolist()
    for bad in (None, [0.0] * WIDTH, [float("nan")] * WIDTH, [float("inf")] + [0.0] * (WIDTH - 1)):
        embeddings.append(bad)
        uids.append(len(uids))
    again = rng.integers(0, count, 3)  # a second caption of three samples
    return pool(uids + [uids[i] for i in again], embeddings + [embeddings[i] for i in again])


def plain_semdedup(rows: pl.DataFrame, centroids: np.ndarray, epsilon: float) -> tuple[dict[str, bool], float]:
    """Verdict by uid; and how near a cosine is to the threshold, or a distance to another."""
    clusters: dict[int, list[tuple[float, str, np.ndarray]]] = {}
    margin = 1.0
    for row in rows.unique("uid").to_dicts():
        vector = None if row["b32_img"] is None else np.array(row["b32_img"], np.float64)
        if vector is None or not np.isfinite(vector).all() or not vector.any():
            continue
        vector = vector / np.linalg.norm(vector)
        cosines = [float(vector @ centroid) for centroid in centroids.astype(np.float64)]
        best = int(np.argmax(cosines))
        margin = min([margin, *np.diff(sorted(cosines))[-1:].tolist()])
        clusters.setdefault(best, []).append((-(1 - cosines[best]), row["uid"], vector))
    verdict = {}
    for members in clusters.values():
        members.sort(key=lambda member: (round(member[0], 9), member[1]))
        gaps = np.diff([distance for distance, _, _ in members])
        margin = min([margin, *gaps[gaps > 1e-9].tolist()])
        for number, (_, one, vector) in enumerate(members):
            similar = [float(vector @ other) for _, _, other in members[:number]]
            verdict[one] = not any(cosine > 1 - epsilon for cosine in similar)
            margin = min([margin, *(abs(cosine - (1 - epsilon)) for cosine in similar)])
    return verdict, margin


def states_of(one: SemanticDuplicate, rows: pl.DataFrame) -> list[pl.DataFrame]:
    states: list[pl.DataFrame] = []
    for _ in range(3):
        states.append(one.merge([one.partial(rows, states).lazy()], states))
    return states


@settings(max_examples=25, deadline=None, phases=(Phase.generate,))
@given(st.data(), pools(), st.sampled_from([0.02, 0.2]), st.sampled_from([None, 2, 3]))
def test_verdicts_are_semdedups(data: st.DataObject, rows: pl.DataFrame, epsilon: float, clusters: int | None) -> None:
    one = SemanticDuplicate(epsilon=epsilon, num_clusters=clusters, iterations=5)
    centroids = np.stack(states_of(one, rows)[1]["vector"].to_numpy())
    expected, margin = plain_semdedup(rows, centroids, epsilon)
    found = assert_cuts_do_not_matter(one, rows, data)
    if margin > 1e-6:  # nearer, float32 and float64 may say different things
        assert found == [expected.get(one) for one in rows["uid"]]


def test_the_farthest_from_the_centroid_stays() -> None:
    def at(degrees: float) -> list[float]:
        return [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))]

    # one cluster, its centroid near 10 degrees: 0 is farthest, 12 nearest; 40 is like none of them
    rows = pool([1, 2, 3, 4], [at(12), at(8), at(0), at(40)])
    one = SemanticDuplicate(epsilon=1 - np.cos(np.radians(9)), num_clusters=1)
    # 8 is within 9 degrees of 0, and so dropped; 12 is within 9 of 8, although that is dropped itself
    assert one.keep(rows).to_list() == [False, False, True, True]


def test_lengths_do_not_matter_and_ties_go_to_the_smallest_uid() -> None:
    rows = pool([9, 3, 5], [[1.0, 2.0], [10.0, 20.0], [0.5, 1.0]])
    assert SemanticDuplicate().keep(rows).to_list() == [False, True, False]


def test_a_pool_without_embeddings() -> None:
    rows = pool([1, 2], [None, [0.0, 0.0]])
    assert SemanticDuplicate().keep(rows).to_list() == [None, None]
    assert SemanticDuplicate().keep(rows.clear()).to_list() == []
    with pytest.raises(MmfoundryError, match="3 clusters"):
        SemanticDuplicate(num_clusters=3).keep(pool([1, 2], [[1.0, 0.0], [0.0, 1.0]]))


def test_training_takes_no_more_points_than_asked() -> None:
    rng = np.random.default_rng(0)
    rows = pool(list(range(500)), rng.standard_normal((500, WIDTH)).tolist())
    one = SemanticDuplicate(num_clusters=2, points_per_cluster=20)
    state = one.merge([one.partial(part, []).lazy() for part in (rows[:100], rows[100:])], [])
    assert (state["samples"][0], state["clusters"][0]) == (500, 2)
    assert sum(one.partial(part, [state]).height for part in (rows[:100], rows[100:])) == 40


def test_files_of_clusters_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    near = np.repeat(rng.standard_normal((60, WIDTH)), 3, axis=0) + 0.05 * rng.standard_normal((180, WIDTH))
    rows = pool(rng.permutation(180).tolist(), near.tolist())
    one = SemanticDuplicate(num_clusters=12)
    whole = one.keep(rows).to_list()
    assert 30 < sum(map(bool, whole)) < 150
    monkeypatch.setattr(semantic, "_BUCKET_BYTES", 900)
    monkeypatch.setattr(semantic, "_ROWS_A_BLOCK", 4)
    assert keep_in_parts(one, [rows[:50], rows[50:]]).to_list() == whole


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    units, _ = unit_vectors(pl.Series(np.random.default_rng(2).standard_normal((50, 3)).tolist()))
    whole = drop_similar(units, 0.9)
    assert 0 < whole.sum() < 50
    monkeypatch.setattr(semantic, "_ROWS_A_BLOCK", 7)
    assert drop_similar(units, 0.9).tolist() == whole.tolist()


def test_the_nearest_centroid_does_not_depend_on_the_company() -> None:
    rng = np.random.default_rng(3)
    units, _ = unit_vectors(pl.Series(rng.standard_normal((300, 64)).tolist()))
    clusters, distances = nearest_centroids(units, units[:20])
    apart = [nearest_centroids(units[i : i + 1], units[:20]) for i in range(300)]
    assert [int(found[0][0]) for found in apart] == clusters.tolist()
    assert [float(found[1][0]) for found in apart] == distances.tolist()
