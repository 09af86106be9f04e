from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmfoundry.pipeline.tensor_file import Spec, TensorFile, file_order

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "wide": torch.tensor([2**40, -1]),
    "ünïcode/exp_avg": torch.randn(7),
}
SPECS: dict[str, Spec] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x.safetensors", SPECS)
    for name in file_order(SPECS):
        file.add(name, TENSORS[name])
    file.close()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x.safetensors", SPECS)
    with pytest.raises(ValueError, match="announced"):
        file.add("flags", TENSORS["flags"])  # not its turn
    file = TensorFile(tmp_path / "x.safetensors", SPECS)
    with pytest.raises(ValueError, match="announced"):
        file.add("wide", TENSORS["wide"][:1])
    with pytest.raises(ValueError, match="were not written"):
        TensorFile(tmp_path / "x.safetensors", SPECS).close()
