"""The one attention function of the package: every tower calls it, so a faster kernel has one place to go."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    return F.scaled_dot_product_attention(q_bhtd, k_bhsd, v_bhsd, attn_mask=mask, is_causal=is_causal)
