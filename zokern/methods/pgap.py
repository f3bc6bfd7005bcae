"""P-GAP: projected gradient-aligned perturbations. Zhang et al. 2025, arXiv 2510.18228."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import gemm
from ..backends import Noise
from ..checks import whole_number
from ..directions import Aligned, Matrix, Normal
from ..estimator import CENTRAL, coefficient
from ..evaluation import Point
from ..optimizer import ZerothOrder
from ..plan import Group, Plan
from ..rule import basis_of
from ..stream import BASIS, draw_word

PROBE = draw_word(2, BASIS)  # draw word of the first probe; words 0 and 1 belong to the basis


class PGAP(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k s U Z_k V^T, with U, S, V of an estimated gradient and Z_k on a hyperplane.

    Every `interval` steps, before the step: G = (1/h) sum_{i<=h} c_i z_i from h dense central differences on the step's own batch, and
    for every matrix U S V^T, the truncated singular value decomposition of its part of G, by a randomized range finder that never holds G.
    A step draws Z0 (r x r) and moves its component along diag(S) to <diag(S), Z> = xi sqrt(delta) ||S||:

        Z = Z0 - (sum_i S_i Z0_ii - xi sqrt(delta) ||S||) / (||S||^2 + 1e-12) diag(S)

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights. Published for LoRA: lr 1e-2 to 5e-2, eps 0.1; for all weights nothing was found: with norm='unit'
              ||z||_F^2 is about r^2, so MeZO's step length needs eps sqrt(m n) / r, and norm='matched' makes MeZO's eps and lr fit
    rank      r, at most min(m, n): 128 to 512 for all weights, 8 for LoRA
    interval  k, steps between two bases: 100 (another reading of the paper: 16 or 512)
    probes    h: 10
    delta     delta_0 = 2, falling linearly to 0 over `steps` steps (None: it does not fall)
    sign      xi: 'matrix' (the paper: random, here one per matrix and draw), 'step', 'positive' (a public re-implementation)
    norm      s: 'unit' 1 (the paper's formula), 'matched' sqrt(m n) / r (SubZero's scale)
    dense     what parameters that are not matrices take: a dense normal z. The paper does not say
    oversample, power   of the range finder: extra columns, and power iterations
    defer, options      as for zokern.SubZero

    The basis is a function of the probes' coefficients, which state_dict keeps: a resumed run draws the same. Its last bits depend on
    the machine's matrix products and LAPACK (one thread is used, so not on the thread count).
    With h dense probes the estimate is dominated by noise for m, n above about 1000: the basis is then close to a random one, as in SubZero.
    Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-7,
        eps: float = 1e-3,
        *,
        rank: int = 128,
        interval: int = 100,
        probes: int = 10,
        delta: float = 2.0,
        steps: int | None = None,
        sign: str = "matrix",
        norm: str = "matched",
        oversample: int = 8,
        power: int = 1,
        evaluation: Any = "auto",
        **options: Any,
    ) -> None:
        self.probes = whole_number("probes", probes)
        self.oversample, self.power = whole_number("oversample", oversample, 0), whole_number("power", power, 0)
        self.probed: tuple[int, list[float]] | None = None  # step and coefficients of the basis in use
        self.former: dict[int, list[float]] = {}  # those of earlier bases that momentum still belongs to
        direction = Aligned(rank, interval, delta, steps, sign, norm)
        super().__init__(params, lr=lr, eps=eps, direction=direction, evaluation=evaluation, **options)

    def refresh(self, plan: Plan, closure: Callable[[], Any]) -> None:
        """Probe and decompose where this step needs a new basis. Weights are read, not written (evaluation 'inplace': up to rounding)."""
        assert self.factored is not None
        born = self.factored.basis_step(plan.step)
        self.settle(plan)
        if all(matrix.born == born for group in plan.groups for matrix in group.matrices or ()):
            return
        self._recall(plan)
        if self.probed is None or self.probed[0] != born:
            if plan.step != born:
                raise RuntimeError(
                    f"step {plan.step} needs the basis of step {born}, whose probes are not known: load the state_dict of that run"
                )
            if self.probed is not None:
                self.former[self.probed[0]] = self.probed[1]
            self.probed = (born, self._probe(plan, closure))
        self._renew(plan)
        needed = {basis_of(self.rule, self.state, tensor) for tensor in [*self.state]}
        self.former = {step: found for step, found in self.former.items() if step in needed}

    def _recall(self, plan: Plan) -> None:
        """After loading a state, the bases that its momentum belongs to come first: those of matrices that were frozen may differ."""
        known = self.former if self.probed is None else {**self.former, self.probed[0]: self.probed[1]}
        for group in plan.groups:
            for i, (matrix, tensor) in enumerate(zip(group.matrices or (), group.tensors)):
                kept = basis_of(self.rule, self.state, tensor) if matrix.born < 0 else None
                if kept is not None and kept < 0 and self.probed is not None:
                    kept = self.probed[0]  # states of older versions do not say
                if kept is None:
                    continue
                if kept not in known:
                    raise RuntimeError(
                        f"the momentum of {matrix.name!r} belongs to the basis of step {kept}, whose probes are not known (those of "
                        f"{sorted(known)} are): load the state_dict of that run, or start it anew with `del optimizer.state[parameter]`"
                    )
                self._decompose(group, i, matrix, plan.seed, kept, known[kept])

    def _renew(self, plan: Plan) -> None:
        """Bases from the probes that are known, for matrices that have others or none; what a rule keeps is carried over."""
        assert self.probed is not None
        born, found = self.probed
        for group in plan.groups:
            for i, matrix in enumerate(group.matrices or ()):
                if matrix.born != born:
                    left, right = matrix.left, matrix.right
                    self._decompose(group, i, matrix, plan.seed, born, found)
                    if right is not None:
                        self.rule.rebase(group, matrix, left, right, self.state[group.tensors[i]])

    def _probe(self, plan: Plan, closure: Callable[[], Any]) -> list[float]:
        """h central differences along dense normals, in units of loss per weight, with the first group's eps."""
        dense = [replace(group, matrices=None, eps=plan.groups[0].eps, memo={}) for group in plan.groups]
        probe = replace(plan, groups=dense, direction=Normal(), factored=None)
        found = []
        for k in range(self.probes):  # two sides at a time: no more activations than a step's
            pair = [Point(((PROBE + k, offset),)) for offset in CENTRAL.offsets]
            losses = self.evaluation.losses(probe, pair, closure).tolist()
            found.append(coefficient(losses, CENTRAL, plan.groups[0].eps))
        return [c if math.isfinite(c) else 0.0 for c in found]

    def _decompose(self, group: Group, i: int, matrix: Matrix, seed: int, born: int, coefficients: Sequence[float]) -> None:
        """Set matrix.left, right and its spectrum to the truncated decomposition of G; a random basis where G is zero."""
        draws = [(born, PROBE + k) for k in range(len(coefficients))]
        weights = [c / len(coefficients) for c in coefficients]
        width = min(matrix.rank + self.oversample, *matrix.shape)
        source = group.source(seed)
        assert self.factored is not None
        if not any(weights):
            self.factored.refresh([matrix], source, born)
            matrix.extra.pop("spectrum", None)
            return

        def times(omega: Tensor, transposed: bool = False) -> Tensor:
            span = group.spans[i]
            noise = Noise(Normal(), seed, draws)
            return gemm.sketch_of(group.backend, noise, weights, span, matrix.shape, omega, transposed)

        with _one_thread(), torch.autocast(matrix.device.type, enabled=False):
            (omega,) = source([matrix], [(matrix.columns, width)], born, draw_word(1, BASIS))
            q = torch.linalg.qr(times(omega))[0]
            for _ in range(self.power):
                q = torch.linalg.qr(times(torch.linalg.qr(times(q, True))[0]))[0]
            b = times(q, True)  # G^T Q: n x width
            right, spectrum, small = torch.linalg.svd(b.double(), full_matrices=False)
            matrix.left = (q.double() @ small.mT[:, : matrix.rank]).float().contiguous()
            matrix.right = right[:, : matrix.rank].float().contiguous()
            matrix.extra["spectrum"] = spectrum[: matrix.rank].float()
        matrix.born = born

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["zokern"]["probed"] = self.probed
        state["zokern"]["former"] = dict(self.former)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.probed = state_dict["zokern"].get("probed")
        self.former = dict(state_dict["zokern"].get("former") or {})

    def described(self) -> dict[str, Any]:
        """The numbers of the method itself, which decide a run beside those of its parts."""
        return {"probes": self.probes, "oversample": self.oversample, "power": self.power}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of a product depend on how many threads share it; these must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
