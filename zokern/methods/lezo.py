"""LeZO: SGD on a random share of the layers in each step. Wang et al. 2024, arXiv 2410.09823."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..estimator import Layers, Spsa, Stencil
from ..estimator.blocks import layer_of
from ..optimizer import ZerothOrder


class LeZO(ZerothOrder):
    """theta_A <- (1 - lr wd) theta_A - (lr / q) sum_k c_k z_k,   A: a random 1 - sparsity of the layers
    c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps),   z_k is 0 outside of A

    The layers of a step are a function of (seed, name of the layer, step). The reference's code was not
    found. Whether embeddings and head take part there is not known.

    Use it to compare with the paper, which wants it for speed: a layer that stays is spared its perturbation
    and its update. Here these cost little beside the forwards (docs/speed.md). It reads 2 q losses a step and
    keeps nothing.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights, as for MeZO. None: lr 2e-5
    sparsity  share of the layers that stay: 0.75 is typical of the paper
    layer     a function from a parameter's name to its layer's, or to None where it moves in every step; by
              default its name up to the first number, so that embeddings and head always move
    queries   q: draws a step, averaged
    stencil   'central' or 'forward'
    options   those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, sparsity: float = 0.75,
        layer: Callable[[str], str | None] = layer_of, queries: int = 1, stencil: str | Stencil = "central",
        **options: Any,
    ) -> None:  # fmt: skip
        estimator = Layers(Spsa(queries, stencil), sparsity, layer)
        super().__init__(params, lr=lr, eps=eps, estimator=estimator, **options)
