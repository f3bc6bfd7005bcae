"""TeZO, TeZO-m and TeZO-Adam: SGD, momentum and Adam of r numbers a matrix. Sun et al. 2025, "TeZO:
Empowering the Low-Rankness on the Temporal Dimension in the Zeroth-Order Optimization for Fine-tuning
LLMs"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checks import whole_number
from ..directions import Diagonal
from ..directions.lowrank import matrix_shape
from ..optimizer import ZerothOrder
from ..parameters import inner, is_wrapped, plain, plain_names
from ..rule import Adam, Momentum, Rule, Sgd


class TeZO(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k z_k,   z_k = s U diag(tau_k) V^T
    c_k = (L(W + eps z_k) - L(W - eps z_k)) / (2 eps)

    U (m x r) and V (n x r) are normal and drawn once for the run; a step draws r numbers tau per matrix.
    Parameters that are not matrices take a dense normal z.

    Use it where Adam's moments have to be cheap: they are 2 r numbers a matrix. The run stays in a space of r
    directions for each matrix.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights, of MeZO's size; with 'adam' lr is in weights, 2e-4 by default. No
              published numbers were found
    rank      r of every matrix, or a mapping from parameter name to r for those that differ from 32
              (spectral_ranks makes one)
    rule      'sgd'; 'momentum' (TeZO-m): tau_M <- b1 tau_M + (1 - b1) c tau, from the first c tau on; 'adam'
              (TeZO-Adam): also tau_V <- b2 tau_V + (1 - b2) c^2 tau^2 and W <- W - lr (U diag(tau_M) V^T) /
              sqrt(U^2 diag(tau_V) (V^2)^T + adam_eps), squares elementwise. Or a rule, taken as it is:
              zokern.Adam(inside=True, bias_correction=False) is 'adam'
    norm      s: 'matched' 1 / sqrt(r), E||z||_F^2 = m n as for a dense z; 'unit' 1, the paper's formula,
              E||z||_F^2 = m n r. tau stands for s tau above
    betas, adam_eps, bias_correction   of 'momentum' (its first beta) and 'adam'; the paper's form has no bias
                                       correction
    defer     updates wait in the core until flush(); the basis never changes. Not with 'adam', which is no
              low-rank update
    options   those of zokern.MeZO; evaluation is 'auto' by default

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        *,
        rank: int | Mapping[str, int] = 32,
        rule: str | Rule = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        bias_correction: bool = False,
        norm: str = "matched",
        **options: Any,
    ) -> None:
        if not isinstance(rank, Mapping):
            rank = whole_number(
                "rank", rank, expected="an integer, at least 1, or a mapping from parameter names to such"
            )
        ranks = {"ranks": _by_plain_name(params, rank)} if isinstance(rank, Mapping) else {"rank": rank}
        direction = Diagonal(**ranks, norm=norm)
        adam = Adam(betas, adam_eps, bias_correction, inside=True)
        named: dict[str, Rule] = {"sgd": Sgd(), "momentum": Momentum(adam.betas[0]), "adam": adam}
        known = rule in named if isinstance(rule, str) else isinstance(rule, Rule)
        if not known:
            raise ValueError(
                f"rule is {rule!r}; expected 'sgd', 'momentum' or 'adam', or a rule such as zokern.Adam()"
            )
        chosen = named[rule] if isinstance(rule, str) else rule
        super().__init__(params, lr=lr, eps=eps, direction=direction, rule=chosen, **options)
        if unknown := sorted(direction.ranks.keys() - {plain(name) for name in self.ids}):
            raise ValueError(
                f"rank names {unknown}, which no parameter is called; the parameters are {sorted(self.ids)}"
            )


def _by_plain_name(params: Any, rank: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks under the names that decide z,
    whether they were given under those or under a wrapper's."""
    if isinstance(params, nn.Module):
        names = plain_names(inner(params)) | plain_names(params)
        return {names.get(name, plain(name)): r for name, r in rank.items()}
    strips = is_wrapped(rank)
    return {plain(name).removeprefix("module.") if strips else plain(name): r for name, r in rank.items()}


@torch.no_grad()
def spectral_ranks(model: nn.Module, energy: float = 0.25, largest: int = 64) -> dict[str, int]:
    """A rank for every trained matrix: the fewest singular values that hold a share `energy` of its squared
    norm, at most `largest`.

    The paper takes layer-wise ranks from the weights' spectra and caps them; its threshold was not found, so
    it is an argument. Cost: a singular value decomposition per matrix."""
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy is {energy!r}; expected 0 < energy <= 1")
    ranks, names = {}, plain_names(inner(model))
    for name, parameter in inner(model).named_parameters():
        shape = matrix_shape(parameter)
        if parameter.requires_grad and shape is not None:
            square = torch.linalg.svdvals(parameter.detach().float().reshape(shape)).double() ** 2
            share = square.cumsum(0) / square.sum()
            ranks[names[name]] = max(1, min(largest, int((share < energy).sum()) + 1))
    return ranks
