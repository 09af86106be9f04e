"""The one attention function of the package: every tower calls it, so a faster kernel has one place to go."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


# Shape suffixes: b = batch, h = heads, t = query positions, s = key positions, d = width of a head
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
