"""Hybrid: back-propagation for the last modules, a zeroth-order estimate for the rest. Zhang et al. 2024
(ZO-Bench), arXiv 2402.11592; Sugiura and Matsutani 2025 (ElasticZO), arXiv 2501.04287."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..estimator import Estimator, Split
from ..estimator.blocks import block_of
from ..optimizer import ZerothOrder

ADAMW = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0)


class Hybrid(ZerothOrder):
    """theta_2 <- (1 - lr wd) theta_2 - lr c z_2,   theta_1 <- optimizer(theta_1, grad L),   both at theta
    c = (L(theta_1, theta_2 + eps z_2) - L(theta_1, theta_2 - eps z_2)) / (2 eps)
    opt = zokern.Hybrid(model, first_order=[model.lm_head], optimizer=lambda ps: torch.optim.SGD(ps, lr=1e-2))

    A third forward reads L at theta, with a graph that begins at theta_1: what lies below keeps no
    activations and no gradients.

    Use it where a head or the last blocks fit back-propagation, and the rest does not:
    a new head needs its gradient most.

    params       a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO: theta_1 and
                 theta_2
    lr, eps      of theta_2, in weights, as for zokern.MeZO
    first_order  theta_1: modules, parameters, names, or beginnings of names up to a dot; or a function from a
                 name to bool. None: the last transformer block and what follows it,
                 but no head that is tied to the embedding
    optimizer    a function from the parameters theta_1 to their torch optimizer, which opt.first_order then
                 is: schedules take it, and state_dict has its state. None: torch.optim.AdamW with lr 1e-4
    estimator    of theta_2; None: zokern.Spsa(), the formula above
    options      those of zokern.MeZO

    Raises ValueError or TypeError, before any weight is touched, for arguments out of range, and where
    theta_1 or theta_2 is empty."""

    def __init__(
        self, params: Any, lr: float | None = None, eps: float = 1e-3, *, first_order: Any = None,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        estimator: Estimator | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, eps=eps, estimator=Split((), estimator), **options)
        trained = {e.name: e.tensor for group in self.work.entries for e in group if e.tensor.requires_grad}
        chosen, _ = Split(_chosen(self.work.known(), first_order), estimator).parts(trained)
        self.first_order = (ADAMW if optimizer is None else optimizer)([trained[name] for name in chosen])
        self.estimator = Split(chosen, estimator, self.first_order).fresh()


def _chosen(known: dict[str, Any], wanted: Any) -> set[str]:
    """Returns the names that `first_order` stands for.
    Raises ValueError where a part of it stands for none."""
    if callable(wanted) and not isinstance(wanted, nn.Module):
        return {name for name in known if wanted(name)}
    if wanted is None:
        blocks = list(dict.fromkeys(map(block_of, known)))
        last = max(
            (i for i, block in enumerate(blocks) if block.rpartition(".")[2].isdigit()),
            default=len(blocks) - 1,
        )
        return {name for name in known if block_of(name) in blocks[last:]}
    found: set[str] = set()
    for one in [wanted] if isinstance(wanted, (str, nn.Module, Tensor)) else wanted:
        ids = {id(p) for p in one.parameters()} if isinstance(one, nn.Module) else {id(one)}
        part = {
            name
            for name, t in known.items()
            if id(t) in ids or (isinstance(one, str) and f"{name}.".startswith(f"{one}."))
        }
        if not part:
            raise ValueError(
                f"first_order has {one!r:.60}, which no trained parameter belongs to; the names are such as "
                f"{list(known)[-3:]}"
            )
        found |= part
    return found
