"""models/attention.py against the formula, forward and backward."""

import pytest
import torch
from torch import Tensor

from mmfoundry.models.attention import attention


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
