"""SubZero: zeroth-order SGD in random subspaces. Yu et al. 2025, "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces"."""

from __future__ import annotations

from typing import Any

from ..directions import Subspace
from ..optimizer import ZerothOrder


class SubZero(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k s U Z_k V^T,   c_k = (L(W + eps s U Z_k V^T) - L(W - eps s U Z_k V^T)) / (2 eps)."""

    def __init__(self, params: Any, lr: float = 1e-7, eps: float = 1e-3, *, rank: int = 8, interval: int = 2000, norm: str = "matched",
                 reshape: str = "adapters", **options: Any) -> None:  # fmt: skip
        options.setdefault("evaluation", "paired")
        super().__init__(params, lr=lr, eps=eps, direction=Subspace(rank, interval, norm, reshape), **options)
