"""The one attention function of the package: every tower calls it, so a faster kernel has one place to go.

`attention` takes sequences that are equally long; `varlen_attention` takes sequences of any lengths laid one after
another, without padding.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
Attend = Callable[..., Tensor]  # of queries, keys, values, their packing, and whether it is causal

# Shape suffixes: b = batch, h = heads, t = query positions, s = key positions, d = width of a head, T = query
# positions of all sequences, S = key positions of all sequences


def attention(
    q_bhtd: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1), scores scaled by 1/sqrt(d).

    Args:
        q_bhtd: queries.
        k_bhsd: keys.
        v_bhsd: values.
        is_causal: query t sees keys 0..t only; needs t == s, because the first query must be the first position.
        mask: boolean, broadcastable to (b, h, t, s), True where a query may look; not together with `is_causal`.

    Returns:
        (b, h, t, d), in the dtype of the queries.

    Raises:
        ValueError: `is_causal` together with a mask, or with fewer queries than keys (the kernels disagree on
            which keys such queries see).
    """
    if is_causal and mask is not None:
        raise ValueError("give either is_causal or a mask, not both")
    if is_causal and q_bhtd.shape[2] != k_bhsd.shape[2]:
        raise ValueError(f"causal attention needs as many queries as keys: {q_bhtd.shape[2]} and {k_bhsd.shape[2]}")
    if q_bhtd.device.type == "cpu" and q_bhtd.dtype in HALVES:
        # torch's kernel for 16 bits rounds more and takes 1.2 (257 positions) to 6 times (20) as long as that for 32,
        # casts included, forward and backward on a core with AVX-512 (benchmarks/results/2026-11-21-training.md).
        with torch.autocast("cpu", enabled=False):  # it would narrow them again
            wide = F.scaled_dot_product_attention(
                q_bhtd.float(), k_bhsd.float(), v_bhsd.float(), attn_mask=mask, is_causal=is_causal
            )
        return wide.to(q_bhtd.dtype)
    return F.scaled_dot_product_attention(q_bhtd, k_bhsd, v_bhsd, attn_mask=mask, is_causal=is_causal)


@dataclass(frozen=True)
class Packing:
    """Sequences laid one after another without padding: where each begins and ends, and what attends within them.

    Attributes:
        lengths: of each sequence, tokens, at least 1, known to the host.
        cu_seqlens: (b + 1,) int32, on the device: the running sum of the lengths, from 0.
        max_seqlen: the greatest length.
        kernel: of `VARLEN_KERNELS`, the one that the device has for 16 bits; None: it has none.
        by_sdpa: what computes all that no such kernel does; torch.compile calls it and does not look into it, because
            the lengths differ from batch to batch.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    kernel: str | None
    by_sdpa: Attend

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """The packing of sequences of these lengths on a device.

        Raises:
            ValueError: there is no sequence, or one without a token.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"each packed sequence has a token or more; lengths are {list(lengths)}")
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        kernel = varlen_kernel(device.type, capability)
        return cls(tuple(lengths), cu_seqlens, max(lengths), kernel, _not_compiled(_by_sdpa))


def varlen_attention(
    q_Thd: Tensor, k_Shd: Tensor, v_Shd: Tensor, packing: Packing, *, is_causal: bool = False
) -> Tensor:
    """`attention` within each of several packed sequences; nothing is padded, whatever computes it.

    Args:
        q_Thd: queries; as many as keys, or one a sequence, which sees all of that sequence.
        k_Shd: keys.
        v_Shd: values.
        packing: of the keys.
        is_causal: a query sees the keys of its sequence up to itself; needs as many queries as keys.

    Returns:
        (T, h, d), in the dtype of the queries.

    Raises:
        ValueError: the queries are as many as neither keys nor sequences, or `is_causal` with one a sequence.
    """
    queries, keys, sequences = len(q_Thd), len(k_Shd), len(packing.cu_seqlens) - 1
    if queries not in (keys, sequences):
        raise ValueError(f"{queries} queries, but {keys} keys in {sequences} sequences")
    if is_causal and queries != keys:
        raise ValueError(f"causal attention needs as many queries as keys: {queries} and {keys}")
    if packing.kernel is not None and kernels_take(q_Thd.dtype, q_Thd.shape[-1]):
        return VARLEN_KERNELS[packing.kernel](q_Thd, k_Shd, v_Shd, packing, is_causal)
    return packing.by_sdpa(q_Thd, k_Shd, v_Shd, packing, is_causal)


def varlen_kernel(device_type: str, capability: tuple[int, int]) -> str | None:
    """The kernel for packed sequences that a device has: torch's own, else flash-attn's; None: neither.

    Args:
        device_type: "cuda" or another.
        capability: as `torch.cuda.get_device_capability` gives it; both kernels begin with Ampere, 8.0.
    """
    if device_type == "cuda" and capability >= (8, 0):
        if torch_has_varlen():
            return "torch"
        if importlib.util.find_spec("flash_attn") is not None:
            return "flash_attn"
    return None


def kernels_take(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels compute in this dtype and at this width of a head."""
    return dtype in HALVES and head_dim % 8 == 0 and head_dim <= 256


def torch_has_varlen() -> bool:
    """Whether torch brings its own kernel: from 2.12 on with these arguments, in CUDA builds with flash attention."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    takes = inspect.signature(varlen_attn).parameters
    return "window_size" in takes and torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None


def varlen_ends(q_Thd: Tensor, k_Shd: Tensor, packing: Packing) -> tuple[Tensor, Tensor, int, int]:
    """`cu_seqlens` of queries and of keys, then `max_seqlen` of both: what each kernel takes behind the values."""
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    if len(q_Thd) == len(k_Shd):
        return cu_seqlens, cu_seqlens, longest, longest
    return torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device), cu_seqlens, 1, longest


def _by_torch(q_Thd: Tensor, k_Shd: Tensor, v_Shd: Tensor, packing: Packing, is_causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if is_causal else (-1, -1)  # how many keys before and behind a query's own; -1: all
    found: Any = varlen_attn(q_Thd, k_Shd, v_Shd, *varlen_ends(q_Thd, k_Shd, packing), window_size=window)
    return found


def _by_flash_attn(q_Thd: Tensor, k_Shd: Tensor, v_Shd: Tensor, packing: Packing, is_causal: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    found: Tensor = flash_attn_varlen_func(q_Thd, k_Shd, v_Shd, *varlen_ends(q_Thd, k_Shd, packing), causal=is_causal)
    return found


def _by_sdpa(q_Thd: Tensor, k_Shd: Tensor, v_Shd: Tensor, packing: Packing, is_causal: bool) -> Tensor:
    """Neighbours of equal length together: few calls where sequences are sorted by length, no padding in any order."""
    runs = [(len(list(same)), length) for length, same in groupby(packing.lengths)]
    rows = [count for count, _ in runs]
    keys = [count * length for count, length in runs]
    queries = keys if len(q_Thd) == len(k_Shd) else rows
    parts = []
    for count, *qkv in zip(rows, q_Thd.split(queries), k_Shd.split(keys), v_Shd.split(keys), strict=True):
        q_bhtd, k_bhsd, v_bhsd = (each.unflatten(0, (count, -1)).transpose(1, 2) for each in qkv)
        parts.append(attention(q_bhtd, k_bhsd, v_bhsd, is_causal=is_causal).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


@cache
def _not_compiled(function: Attend) -> Attend:
    """`torch.compiler.disable`, when it is needed first: it loads the compiler, which takes a second."""
    return torch.compiler.disable(function)


VARLEN_KERNELS: dict[str, Attend] = {"torch": _by_torch, "flash_attn": _by_flash_attn}
