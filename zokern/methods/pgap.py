"""P-GAP: SGD along low-rank draws that are aligned with a probed gradient. Zhang et al. 2025, arXiv
2510.18228."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import autocast
from ..checks import whole_number
from ..device_numbers import stacked
from ..directions import Aligned, Matrix, Measured, Normal, Source
from ..estimator import Oracle, Spsa
from ..gemm.library import one_thread
from ..optimizer import ZerothOrder
from ..plan import Plan
from ..stream import BASIS, draw_word

PROBE = 2  # query of the first probe; queries 0 and 1 of the purpose BASIS belong to random bases


class Probed(Aligned, Measured):
    """The direction of P-GAP: U, S, V of G = (1/h) sum_{i<=h} c_i z_i,
    from h central differences along dense normals.

    probes             h
    oversample, power  of the randomized range finder, which never holds G: extra columns, and power
                       iterations

    `state` holds the coefficients of the probes by step: a basis is a function of them and of the stream. On
    a GPU they stay there. torch.linalg.svd waits for it once a basis, and the random basis that takes the
    place of one without a slope is made beside it."""

    def __init__(self, probes: int = 10, oversample: int = 8, power: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.probes = whole_number("probes", probes)
        self.oversample = whole_number("oversample", oversample, 0)
        self.power = whole_number("power", power, 0)
        self._newest = -1  # step of the basis in use

    def measure(self, oracle: Oracle, plan: Plan) -> None:
        """Probes where this step begins a basis.
        Weights are read, not written (evaluation 'inplace': up to rounding).

        Raises RuntimeError where the step goes on with a basis whose probes are not known."""
        self._newest = self.basis_step(plan.step)
        if self._newest in self.state:
            return
        if plan.step != self._newest:
            raise RuntimeError(
                f"step {plan.step} needs the basis of step {self._newest}, whose probes are not known: load "
                "the state_dict of that run"
            )
        groups = [replace(group, matrices=None, eps=plan.groups[0].eps, memo={}) for group in plan.groups]
        dense = replace(plan, groups=groups, direction=Normal(), factored=None, scopes={}, earlier={})
        estimator, asks = Spsa(), Oracle(oracle.evaluation, dense, oracle.closure, rows=oracle.rows)
        found = []
        for k in range(self.probes):  # one at a time: no more activations than a step's
            (estimate,) = estimator(asks, replace(dense, first=draw_word(PROBE + k, BASIS)))
            found += plan.at_hand(estimate.coefficients[0].nan_to_num(0.0, 0.0, 0.0))
        self.state[self._newest] = found

    def forget(self, needed: set[int | None]) -> None:
        """Drops the probes of bases that no momentum belongs to."""
        self.state = {
            step: found for step, found in self.state.items() if step in needed or step == self._newest
        }

    def refresh(self, matrices: Sequence[Matrix], source: Source, step: int) -> None:
        """Sets the basis of a step from its probes; a random one where all of them are zero."""
        if step not in self.state:
            raise RuntimeError(
                f"the momentum of {matrices[0].name!r} belongs to the basis of step {step}, whose probes are "
                f"not known (those of {sorted(self.state)} are): load the state_dict of that run, or start "
                "it anew with `del optimizer.state[parameter]`"
            )
        found: Any = self.state[step]
        late = any(isinstance(one, Tensor) for one in found)
        if late:  # the host does not know whether all are zero
            found = stacked(found, torch.empty(0, dtype=torch.float64, device=matrices[0].device))
        if late or not any(found):
            super().refresh(matrices, source, step)
        for matrix in matrices:
            matrix.extra.pop("spectrum", None)
            if late or any(found):
                random: Any = (matrix.left, matrix.right)
                draws = [(step, draw_word(PROBE + k, BASIS)) for k in range(len(found))]
                self._decompose(matrix, source, step, draws, found)
                for side, other in zip(("left", "right"), random if late else ()):
                    # with a spectrum of zeros a draw stays as it is
                    basis = torch.where((found == 0.0).all(), other, getattr(matrix, side))
                    setattr(matrix, side, basis)

    def _decompose(
        self,
        matrix: Matrix,
        source: Source,
        step: int,
        draws: Sequence[tuple[int, int]],
        coefficients: Any,
    ) -> None:
        """Sets left, right and the spectrum of a matrix to the truncated decomposition of G."""
        count = len(coefficients)
        late = isinstance(coefficients, Tensor)
        weights = coefficients / count if late else [c / count for c in coefficients]
        width = min(matrix.rank + self.oversample, *matrix.shape)

        def times(omega: Tensor, transposed: bool = False) -> Tensor:
            return source.sketch(matrix, draws, weights, omega, transposed)

        with one_thread(), autocast.off(matrix.device.type):
            (omega,) = source([matrix], [(matrix.columns, width)], step, draw_word(1, BASIS))
            q = torch.linalg.qr(times(omega))[0]
            for _ in range(self.power):
                q = torch.linalg.qr(times(torch.linalg.qr(times(q, True))[0]))[0]
            b = times(q, True)  # G^T Q: n x width
            right, spectrum, small = torch.linalg.svd(b.double(), full_matrices=False)
            matrix.left = (q.double() @ small.mT[:, : matrix.rank]).float().contiguous()
            matrix.right = right[:, : matrix.rank].float().contiguous()
            matrix.extra["spectrum"] = spectrum[: matrix.rank].float()
        matrix.born = step


class PGAP(ZerothOrder):
    """W <- (1 - lr wd) W - (lr / q) sum_k c_k s U Z_k V^T, with U, S, V of an estimated gradient

    Every `interval` steps, before the step: G = (1/h) sum_{i<=h} c_i z_i from h dense central differences on
    the step's own batch. Of every matrix' part of G a randomized range finder, which never holds G, finds the
    truncated singular value decomposition U S V^T. A step draws Z0 (r x r) and moves its component along
    diag(S), so that <diag(S), Z> = xi sqrt(delta) ||S||.

        Z = Z0 - (sum_i S_i Z0_ii - xi sqrt(delta) ||S||) / (||S||^2 + 1e-12) diag(S)

    Use it to compare with the paper. At the published settings the basis held 0.98 +- 0.06 times as much of
    the true gradient as a random one, on matrices of SmolLM2-135M (`python -m benchmarks.pgap_energy`):
    SubZero costs less. Of a block that is probed alone it held more from about 300 probes on, of a single
    matrix from about 100.

    params    a module, or parameters, (name, parameter) pairs or groups, as for zokern.MeZO
    lr, eps   per step and in weights, of MeZO's size with norm='matched'. Published for LoRA with
              norm='unit': lr 1e-2 to 5e-2, eps 0.1; for all weights nothing was found. With norm='unit'
              ||z||_F^2 is about r^2, and a step of MeZO's length needs eps sqrt(m n) / r and lr m n / r^2
    rank      r, at most min(m, n): 128 to 512 for all weights, 8 for LoRA
    interval  k, steps between two bases: 100 (another reading of the paper: 16 or 512)
    probes    h: 10
    delta     delta_0 = 2, falling linearly to 0 over `steps` steps
    steps     how many these are; None: delta does not fall
    sign      xi: 'matrix' (the paper: random, here one per matrix and draw), 'step', 'positive' (a public
              re-implementation)
    norm      s: 'matched' sqrt(m n) / r, SubZero's scale; 'unit' 1, the paper's formula
    dense     what parameters that are not matrices take: a dense normal z. The paper does not say
    oversample, power   of the range finder: extra columns, and power iterations
    defer, options      as for zokern.SubZero

    The basis is a function of the probes' coefficients, which state_dict keeps: a resumed run draws the same.
    Its last bits depend on the machine's matrix products and LAPACK (one thread is used, so not on the thread
    count). Raises ValueError or TypeError, before any weight is touched, for arguments out of range."""

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
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
        **options: Any,
    ) -> None:
        aligned = {
            "rank": rank,
            "interval": interval,
            "delta": delta,
            "steps": steps,
            "sign": sign,
            "norm": norm,
        }
        direction = Probed(probes, oversample, power, **aligned)
        super().__init__(params, lr=lr, eps=eps, direction=direction, **options)
