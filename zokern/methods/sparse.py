"""Sparse-MeZO: SGD of the small weights of every tensor, while the large ones stay. Liu et al. 2024, "Sparse
MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning"."""

from __future__ import annotations

from typing import Any

from ..checks import within
from ..directions import Masked
from ..optimizer import ZerothOrder


class SparseMeZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k m z_k,   m_i = 1 where |theta_i| <= h, else 0
    c_k = (L(theta + eps m z_k) - L(theta - eps m z_k)) / (2 eps)

    A share 1 - sparsity of each tensor's weights lies below its h, with theta of the first step. The paper
    computes m anew from perturbed weights, which can flip it between two losses. Here it is kept.

    Use it where MeZO is noisy: fewer weights carry the perturbation, and the large ones, which the paper
    finds to do harm, keep their bits.

    params     a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps    in weights; None: 2e-5, as for zokern.MeZO
    sparsity   share of the weights that stay, 0 <= sparsity < 1; the paper: 0.75 to 0.8
    by         'magnitude' as published; 'random': a share drawn from the stream (the paper's R-MeZO, and the
               gradient sparsity of ZO-Bench, Zhang et al. 2024, with the share that is stated)
    every      steps between two random masks (1); of 'magnitude' one mask lasts the run
    scope      'layer': one share for every tensor; 'global': one h for all (zokern.Masked)
    direction  of z: 'normal' or 'rademacher'
    options    those of zokern.MeZO; evaluation is 'auto' by default

    Keeps `mask` in the optimizer's state, bool, 1 byte a weight; a random one in memory alone.

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, sparsity: float = 0.75,
        by: str = "magnitude", every: int = 1,
        scope: str = "layer", direction: Any = "normal", **options: Any,
    ) -> None:  # fmt: skip
        sparsity = within("sparsity", sparsity, 0.0, 1.0, "a number, 0 <= sparsity < 1")
        mask = Masked(1.0 - sparsity, by, every, scope, direction)
        super().__init__(params, lr=lr, eps=eps, direction=mask, **options)
