"""Attention under torch.vmap: the mapped dimension becomes a part of the batch, in one call for all sides.

torch has no mapping rule for its CPU attention and calls it
once for each side (five times the cost on short batches).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autocast

_attention = F.scaled_dot_product_attention


def folded(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    *args: Any, **kwargs: Any
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention of (batch, heads, length, width) that is mapped over the sides; anything
    else goes to torch."""
    functorch: Any = torch._C._functorch
    level, device = functorch.maybe_current_level(), query.device.type
    # which torch does not apply to attention under torch.vmap
    if level is not None and autocast.is_on(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (_cast(t, dtype) for t in (query, key, value))
        attn_mask = None if attn_mask is None else _cast(attn_mask, dtype)
    is_shared = attn_mask is None or not (
        functorch.is_functorch_wrapped_tensor(attn_mask) or (attn_mask.dim() > 3 and attn_mask.shape[0] != 1)
    )
    # pairs of a tensor and its mapped dimension
    found = [functorch._unwrap_batched(t, -1 if level is None else level) for t in (query, key, value)]
    is_mapped = all([at is not None and t.dim() == 5 for t, at in found])
    if dropout_p or not is_mapped or not is_shared:
        return _attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)
    q, k, v = [(t if at == 0 else t.movedim(at, 0)).flatten(0, 1) for t, at in found]
    y = _attention(q, k, v, attn_mask, dropout_p, *args, **kwargs)
    return functorch._add_batch_dim(y.unflatten(0, (-1, query.shape[0])), 0, level)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)


@contextmanager
def folding() -> Iterator[None]:
    """Lets models that look F.scaled_dot_product_attention up find the function above;
    it passes on what is not mapped."""
    before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, folded
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


__all__ = ["folded", "folding"]
