"""The tiled losses hold no more with four ranks than with two; benchmarks/loss_memory.py has the table."""

import torch
from torch.distributed import ProcessGroup

from mmfoundry.models.objectives import OBJECTIVES
from tests.ranks import run_ranks
from tests.scripts import load_script

ROWS = 128


def peaks(group: ProcessGroup | None, names: list[str]) -> list[int]:
    benchmark, device = load_script("loss_memory"), torch.device("cpu")
    output = benchmark.embeddings(ROWS, 0, device)
    found = []
    for name in names:

        def loss(given: object, name: str = name) -> torch.Tensor:
            return OBJECTIVES[name](given, {}, group)["loss"]

        benchmark.both_ways(loss, output, device)  # what is made once only is not counted
        found.append(benchmark.peak_bytes(loss, output, device))
    return found


def test_memory_does_not_grow_with_the_ranks() -> None:
    names = ["info_nce", "siglip", "tiled_info_nce"]
    two, four = (dict(zip(names, run_ranks(peaks, world, names)[0], strict=True)) for world in (2, 4))
    assert four["info_nce"] > 1.5 * two["info_nce"]  # the measure sees what grows
    block = ROWS * 512 * 4  # bytes of one rank's captions; one more may be under way while the next is awaited
    for name in names[1:]:
        assert two[name] > block
        assert four[name] <= two[name] + 2 * block, name


def test_the_table_has_rows_of_ratios() -> None:
    benchmark = load_script("loss_memory")
    found = {"siglip": {who: {"seconds": 0.5, "bytes": size} for who, size in (("ours", 1e6), ("peer", 3e6))}}
    memory, seconds = benchmark.rows_of(found, 2, 64)
    assert memory == {"work": "loss memory siglip 2 x 64", "ours": 1.0, "peer": 3.0, "unit": "MB", "ratio": 3.0}
    assert (seconds["unit"], seconds["ratio"]) == ("ms", 1.0)
