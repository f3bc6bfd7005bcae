"""MeZO: memory-efficient zeroth-order SGD along a dense draw. Malladi et al. 2023, "Fine-Tuning Language
Models with Just Forward Passes"."""

from __future__ import annotations

from typing import Any

from ..backends import Backend
from ..directions import Direction, LowRank, Scaled
from ..estimator import Stencil
from ..evaluation import Evaluation
from ..optimizer import ZerothOrder


class MeZO(ZerothOrder):
    """theta <- (1 - lr wd) theta - (lr / q) sum_k c_k z_k
    c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)

    Use it first. It keeps nothing beside the weights, and all parts can be exchanged: direction, estimator,
    rule, evaluation.

    params        a module (what requires a gradient is trained), or parameters, (name, parameter) pairs or
                  groups as in torch; z depends on names, so pass the module or its named_parameters()
    lr            per step. None: 2e-5 where c is a slope, in weights per unit of it; 2e-4 where steps have
                  one length whatever the slope (estimators Sign and Spread, rule Adam), in weights. They suit
                  models of 1e8 weights (docs/learning-rates.md); the paper, OPT-13B: 1e-6 or 1e-7 for all
                  weights, 1e-4 or 5e-5 with LoRA
    eps           half-width of the difference, in weights; the paper: 1e-3 for all weights, 1e-2 with LoRA
    weight_decay  decoupled, scaled by lr; applies to the whole group (make a second group for norms and
                  biases)
    queries       q: draws per step, averaged (1)
    seed          of the run, in [0, 2**64); (seed, parameter name, step, query) name every z
    rounding      of 16-bit weights in the update: 'nearest', 'stochastic', or 'residual' (bfloat16: exact
                  float32 master, +2 B a weight)
    evaluation    how losses are read, by name or as an instance such as zokern.Scratch(budget=...). 'auto':
                  the first step by 'master', then the fastest that reads the same losses. 'master': the
                  parameters hold theta +- eps z while a loss is read, and a copy holds theta; it is right for
                  any model. 'paired': all sides in one pass of the model. 'scratch': a side at a time, within
                  a budget of memory. 'inplace': the weights move and come back by arithmetic, which 16 bits
                  round. 'jvp': as 'master'; it also reads derivatives, for zokern.FGD
    backend       None chooses by device: 'cpu', 'cuda', then 'triton', then 'reference'
    rule          None: SGD, the formula above. zokern.Momentum(0.9, dampening=0.0) moves along M <- 0.9 M + g
                  in place of g = sum_k c_k z_k / q (ZO-Bench's ZO-SGD-MMT; without dampening=0.0, along the
                  average); zokern.Adam() along the corrected M / (sqrt(V) + 1e-8) of torch.optim.Adam
                  (ZO-Adam)
    direction     'normal' or 'rademacher', a dense z, or a Direction
    stencil       'central' (two losses a query) or 'forward' (one, plus one shared)
    maximize      ascend: the closure returns a reward
    estimator     None: zokern.Spsa(queries, stencil), the formula above. Spsa(clip=...) bounds |c_k|;
                  zokern.Sign, Kernel (KerZOO), Spread (FZOO), Conservative, Blockwise and Bayesian (BSZO) are
                  others; ForwardGradient reads derivatives, and Mixed and Split back-propagate too
                  (zokern.FGD, Addax, Hybrid)
    defer         of directions that are low-rank (zokern.SubZero, ...): whether updates wait in their core.
                  None, the default, where they can; z of 'normal' and 'rademacher' is dense,
                  and its updates never wait
    paired_check  'first': read the first loss of the first step twice and refuse a closure that is not
                  repeatable; n: every n steps too; 0 or None: never
    max_skips     raise after so many steps in a row with an inf or NaN loss; None: never
    dead_limit    raise after so many steps in a row with equal losses; None: never
    nonfinite     'raise' or 'ignore' weights that the update made inf or NaN
    force         accept an eps that rounding swallows for more than half of the 16-bit weights
    every         steps between two looks at the numbers that these options are about; a look waits for the
                  device. None: 1 on a CPU, 16 on a GPU
    group         the processes that share a step (docs/processes.md). None: this one alone; 'auto': all of
                  torch.distributed, whose losses are averaged; a ProcessGroup; or zokern.Parallel(...)

    Writes the parameters once per step, and optimizer state: none for SGD, a float32 (Momentum) or two (Adam)
    for each weight, an int16 for each with rounding='residual'.
    Raises ValueError or TypeError, before any weight is touched, for arguments out of range and parameters
    that cannot be trained exactly."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        queries: int | None = None,
        seed: int = 0,
        rounding: str = "nearest",
        evaluation: str | Evaluation = "auto",
        backend: str | Backend | None = None,
        *,
        direction: str | Direction | LowRank | Scaled = "normal",
        stencil: str | Stencil | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            queries=queries,
            seed=seed,
            rounding=rounding,
            evaluation=evaluation,
            backend=backend,
            direction=direction,
            stencil=stencil,
            **options,
        )
