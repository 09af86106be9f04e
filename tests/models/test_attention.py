"""models/attention.py against the formula, forward and backward; packed sequences against each one alone."""

import importlib.util
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmfoundry.models import attention as module
from mmfoundry.models.attention import (
    VARLEN_KERNELS,
    Packing,
    attention,
    kernels_take,
    torch_has_varlen,
    varlen_attention,
    varlen_ends,
    varlen_kernel,
)

CPU = torch.device("cpu")
in_each_way = pytest.mark.parametrize(
    ("is_causal", "one_query"), [(True, False), (False, False), (False, True)], ids=["causal", "all", "one query"]
)


def plain_math(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one query at a time."""
    out = torch.zeros_like(q)
    for t in range(q.shape[2]):
        score = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k) / q.shape[-1] ** 0.5
        weight = score.masked_fill(~allowed[:, :, t], float("-inf")).exp()
        out[:, :, t] = torch.einsum("bhs,bhsd->bhd", weight / weight.sum(-1, keepdim=True), v)
    return out


@pytest.mark.parametrize("case", ["all", "causal", "masked", "one query"])
def test_against_plain_math(case: str) -> None:
    torch.manual_seed(0)
    queries = 1 if case == "one query" else 7
    q = torch.randn(2, 3, queries, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, queries, 7) > 0.5
    mask[..., 0] = True  # a query that sees nothing has no answer
    allowed = {
        "all": torch.ones(2, 3, 7, 7, dtype=torch.bool),
        "causal": torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 3, 7, 7),
    }.get(case, mask.expand(2, 3, queries, 7))
    options = {"all": {}, "causal": {"is_causal": True}}.get(case, {"mask": mask})
    ours, theirs = attention(q, k, v, **options), plain_math(q, k, v, allowed)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (q, k, v), direction), torch.autograd.grad(theirs, (q, k, v), direction)
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_result_is_rounded_to_16_bits(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 16).to(dtype) for _ in range(3))
    expected = plain_math(q.double(), k.double(), v.double(), torch.ones(2, 3, 20, 20, dtype=torch.bool))
    with torch.autocast("cpu", dtype, enabled=autocast):
        result = attention(q, k, v)
    torch.testing.assert_close(result, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_refuses_what_kernels_disagree_on() -> None:
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="as many queries as keys: 1 and 3"):
        attention(x[:, :, :1], x, x, is_causal=True)
    with pytest.raises(ValueError, match="not both"):
        attention(x, x, x, is_causal=True, mask=torch.ones(3, 3, dtype=torch.bool))


def packed(lengths: list[int], one_query: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of 3 heads 8 wide."""
    torch.manual_seed(0)
    queries = len(lengths) if one_query else sum(lengths)
    return tuple(
        torch.randn(rows, 3, 8, dtype=dtype).requires_grad_() for rows in (queries, sum(lengths), sum(lengths))
    )  # type: ignore[return-value]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], is_causal: bool) -> Tensor:
    """`plain_math` of each sequence alone."""
    parts = []
    queries = lengths if len(q) == len(k) else [1] * len(lengths)
    for each in zip(q.split(queries), k.split(lengths), v.split(lengths), strict=True):
        q1, k1, v1 = (part.transpose(0, 1)[None] for part in each)
        allowed = torch.ones(1, 3, q1.shape[2], k1.shape[2], dtype=torch.bool, device=q.device)
        parts.append(plain_math(q1, k1, v1, allowed.tril() if is_causal else allowed)[0].transpose(0, 1))
    return torch.cat(parts)


@in_each_way
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(deadline=None, max_examples=25)
def test_packed_sequences_against_plain_math(is_causal: bool, one_query: bool, lengths: list[int]) -> None:
    inputs = packed(lengths, one_query)
    ours = varlen_attention(*inputs, Packing.of(lengths, CPU), is_causal=is_causal)
    theirs = one_by_one(*inputs, lengths, is_causal)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction)
    )


def test_of_packed_sequences_too_only_the_result_is_rounded() -> None:
    lengths = [4, 9, 9, 1]
    inputs = [each.detach() for each in packed(lengths, False, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        result = varlen_attention(*inputs, Packing.of(lengths, CPU), is_causal=True)
    expected = one_by_one(*(each.double() for each in inputs), lengths, True)
    torch.testing.assert_close(result, expected.bfloat16(), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)


def test_a_packing_is_as_the_kernels_want_it() -> None:
    packing = Packing.of([2, 5, 1], CPU)
    assert packing.cu_seqlens.tolist() == [0, 2, 7, 8]
    assert packing.cu_seqlens.dtype == torch.int32
    assert (packing.max_seqlen, packing.kernel) == (5, None)
    for lengths in ([], [3, 0]):
        with pytest.raises(ValueError, match="each packed sequence has a token or more"):
            Packing.of(lengths, CPU)


def test_where_queries_and_keys_end() -> None:
    packing, keys = Packing.of([2, 5, 1], CPU), torch.zeros(8, 3, 8)
    for queries, of_queries, longest in (keys, [0, 2, 7, 8], 5), (keys[:3], [0, 1, 2, 3], 1):
        q_ends, k_ends, *maxima = varlen_ends(queries, keys, packing)
        assert q_ends.dtype == k_ends.dtype == torch.int32
        assert (q_ends.tolist(), k_ends.tolist(), maxima) == (of_queries, [0, 2, 7, 8], [longest, 5])


def test_refuses_queries_that_belong_to_no_sequence() -> None:
    x, packing = torch.zeros(6, 1, 4), Packing.of([4, 2], CPU)
    with pytest.raises(ValueError, match="3 queries, but 6 keys in 2 sequences"):
        varlen_attention(x[:3], x, x, packing)
    with pytest.raises(ValueError, match="as many queries as keys: 2 and 6"):
        varlen_attention(x[:2], x, x, packing, is_causal=True)


@pytest.mark.parametrize(
    ("device", "capability", "torch_has", "flash_attn", "chosen"),
    [
        ("cpu", (0, 0), True, True, None),
        ("cuda", (7, 5), True, True, None),
        ("cuda", (8, 0), True, True, "torch"),
        ("cuda", (9, 0), False, True, "flash_attn"),
        ("cuda", (9, 0), False, False, None),
    ],
)
def test_which_kernel_a_device_has(
    device: str,
    capability: tuple[int, int],
    torch_has: bool,
    flash_attn: bool,
    chosen: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "torch_has_varlen", lambda: torch_has)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if flash_attn else None)
    assert varlen_kernel(device, capability) == chosen


def test_what_the_kernels_take() -> None:
    taken = {
        (dtype, d) for dtype in (torch.float32, torch.bfloat16) for d in (12, 64, 256, 264) if kernels_take(dtype, d)
    }
    assert taken == {(torch.bfloat16, 64), (torch.bfloat16, 256)}


class Calls(TorchDispatchMode):
    """Writes down what torch's own operations are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func), args))
        return func(*args, **(kwargs or {}))


@in_each_way
def test_torchs_kernel_is_called_as_it_wants(is_causal: bool, one_query: bool) -> None:
    """On tensors without data, torch's own rules of shapes: that needs no GPU, but says nothing of the numbers."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    queries = 3 if one_query else 8
    with FakeTensorMode():
        fake = [torch.empty(rows, 3, 8, dtype=torch.bfloat16, requires_grad=True) for rows in (queries, 8, 8)]
        packing = Packing((2, 5, 1), torch.empty(4, dtype=torch.int32), 5, "torch", VARLEN_KERNELS["torch"])
        with Calls() as calls:
            out = varlen_attention(*fake, packing, is_causal=is_causal)
            out.sum().backward()
    assert out.shape == fake[0].shape
    assert [each.grad.shape for each in fake] == [each.shape for each in fake]  # type: ignore[union-attr]
    (arguments,) = (args for name, args in calls.seen if name == "torch_attn._varlen_attn.default")
    assert [len(each) for each in arguments[:5]] == [queries, 8, 8, 4, 4]
    assert arguments[5:8] == (1 if one_query else 5, 5, is_causal)
    assert list(arguments[9]) == ([-1, 0] if is_causal else [-1, -1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@in_each_way
@pytest.mark.parametrize("kernel", sorted(VARLEN_KERNELS))
def test_a_gpus_kernels_against_plain_math(kernel: str, is_causal: bool, one_query: bool) -> None:
    if not (torch_has_varlen() if kernel == "torch" else importlib.util.find_spec("flash_attn")):
        pytest.skip(f"no {kernel} here")
    lengths, cuda = [2, 77, 1, 20, 20], torch.device("cuda")
    inputs = [each.detach().to(cuda, torch.bfloat16).requires_grad_() for each in packed(lengths, one_query)]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    packing = Packing.of(lengths, cuda)
    ours = VARLEN_KERNELS[kernel](*inputs, packing, is_causal)
    theirs = one_by_one(*wide, lengths, is_causal)
    # a few roundings to 8 bits on the way
    torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02)
    direction = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, direction)
    expected = torch.autograd.grad(theirs, wide, direction.double())
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double(), other, rtol=0.02, atol=0.03)
