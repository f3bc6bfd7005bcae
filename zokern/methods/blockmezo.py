"""BlockMeZO: SGD with a difference for each block of parameters. Zhang et al. 2024, arXiv 2402.11592."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..estimator import Blockwise, Spsa, Stencil
from ..optimizer import ZerothOrder


class BlockMeZO(ZerothOrder):
    """theta_b <- (1 - lr wd) theta_b - (lr / q) sum_k c_bk z_bk,   for every block b
    c_bk = (L(theta + eps z_bk) - L(theta - eps z_bk)) / (2 eps),   z_bk is 0 outside of block b

    The reference (ZO-Bench) gives every block the same seed, so that blocks of one shape have one z. Here z
    is named by the parameter.

    Use it where updates cost more than forwards: the variance is that of a block's dimension, for B times the
    losses of MeZO. With B blocks it reads 2 q B losses a step, in Jacobi order with 'forward' q B + 1. It
    keeps nothing. Where the closure raises in Gauss-Seidel order, the blocks before have moved, and the step
    has used its number.

    params   a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps  per step and in weights. None: lr 2e-5. ZO-Bench's example: lr 1e-8, eps 1e-3
    block    'layer' (a transformer block), 'sublayer' (its attention, its MLP), 'module' (a linear layer), or
             a function from a parameter's name to its block's.
             OPT with L layers has L + 3, 5 L + 3 and 8 L + 3 blocks
    order    'gauss-seidel': a block has moved before the next is read. 'jacobi': all are read at theta
    queries  q: draws a step, averaged
    stencil  'central' (two losses a query) or 'forward' (one, and that of theta)
    options  those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *,
        block: str | Callable[[str], str] = "layer", order: str = "gauss-seidel", queries: int = 1,
        stencil: str | Stencil = "central", **options: Any,
    ) -> None:  # fmt: skip
        estimator = Blockwise(Spsa(queries, stencil), block, order)
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, **options)
