"""Validation of a launch: dtypes, devices and sizes are checked before a kernel takes a pointer.

Kernels read an address as the type and size that the contract names (base.py). A tensor of another dtype,
device or size would be read wrongly, or beyond its end. The public verbs check their arguments with better
words. A step, a rule and an operation of torch.ops.zokern come straight here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import ROUNDINGS, SCALARS, STATES
from .launch import PROJECTED, Batch, Noise, Outer, Projection, Sides, Span, Terms, Update, Weight
from .lists import SpanList
from .operands import CPU, FLOATS, Operands, given

_SINGLE = frozenset((torch.float32,))


class Validator(Operands):
    """Checks the calls of one backend, a method for each verb.

    Each returns the one device of the tensors, None where there are none. It raises ValueError for operands
    that a kernel would read wrongly."""

    def draw(self, batch: Batch, noise: Noise) -> torch.device | None:
        outs, spans = batch.tensors, batch.spans
        self._count("draw", "spans", spans, outs)
        self.dtypes("draw", "outs", outs, FLOATS, flat=True)
        self.clock("draw", noise.clock)
        beside = {"rows": self.rows("draw", spans, outs), "scales": self.scales("draw", batch, drawn=True)}
        return self.device("draw", outs=outs, clock=given(noise.clock), **beside)

    def axpy_(self, batch: Batch, noise: Noise, terms: Terms) -> torch.device | None:
        thetas, spans, rounding, residuals, scales = batch
        coeffs, clock = terms.coefficients, noise.clock
        self.numbers("axpy_", "coeffs", coeffs, len(noise.draws))
        control = self.control("axpy_", terms.control)
        if control and terms.each not in (0, len(noise.draws)):
            raise ValueError(
                f"backend {self.name!r}: axpy_: each is {terms.each} with a control; expected 0, for one sum"
            )
        simple = residuals is None and scales is None and clock is None and not control
        simple = simple and rounding in ROUNDINGS
        if simple and coeffs.is_cpu and self._is_sound(thetas, spans, ()):
            return CPU
        _, low = self._batch("axpy_", batch)
        self.clock("axpy_", clock)
        rows = self.rows("axpy_", spans, thetas)
        beside = {
            "residuals": low,
            "clock": given(clock),
            "rows": rows,
            "scales": self.scales("axpy_", batch),
            "control": control,
        }
        return self.device("axpy_", tensors=thetas, coeffs=[coeffs], **beside)

    def update_(self, batch: Batch, noise: Noise, update: Update) -> torch.device | None:
        (thetas, spans, *_), (coeffs, rule, scalars, states, control) = batch, update
        check_rows("update_", spans, None)
        sizes, low = self._batch("update_", batch)
        if rule not in STATES or len(states) != len(STATES[rule]):
            kept = {name: list(names) for name, names in STATES.items()}
            raise ValueError(
                f"backend {self.name!r}: update_: rule is {rule!r} with {len(states)} lists of states; "
                f"expected one of {kept}"
            )
        self.numbers("update_", "coeffs", coeffs, len(noise.draws))
        self.numbers("update_", "scalars", scalars, len(SCALARS[rule]))
        for name, state in zip(STATES[rule], states):
            self.dtypes("update_", name, state, _SINGLE, flat=True)
            self.sizes("update_", name, state, sizes)
        self.clock("update_", noise.clock)
        self.rows("update_", spans, thetas)
        flat = [tensor for state in states for tensor in state]
        beside = {"coeffs": [coeffs], "scalars": [scalars], "residuals": low, "clock": given(noise.clock)}
        beside["scales"], beside["control"] = self.scales("update_", batch), self.control("update_", control)
        return self.device("update_", tensors=thetas, states=flat, **beside)

    def perturb(
        self, batch: Batch, noise: Noise, scales: Sequence[float], outs: Sequence[Sequence[Tensor]]
    ) -> torch.device | None:
        thetas, spans, _, residuals, scaled = batch
        if not 1 <= len(scales) == len(outs) <= 2:
            raise ValueError(
                f"backend {self.name!r}: perturb: {len(scales)} scales and {len(outs)} outs; expected one or "
                "two, as many of each"
            )
        if (
            residuals is None
            and scaled is None
            and noise.clock is None
            and self._is_sound(thetas, spans, outs)
        ):
            return CPU
        sizes, low = self._batch("perturb", batch)
        rows = self.rows("perturb", spans, thetas)
        wanted = self._written(spans, thetas, sizes, rows)
        for j, side in enumerate(outs):
            self._results("perturb", f"outs[{j}]", side, thetas, wanted)
        if len(outs) == 2 and [t.dtype for t in outs[0]] != [t.dtype for t in outs[1]]:
            raise ValueError(
                f"backend {self.name!r}: perturb: outs[0] and outs[1] differ in dtype; expected the same for "
                "both scales"
            )
        self.clock("perturb", noise.clock)
        flat = [tensor for side in outs for tensor in side]
        beside = {
            "residuals": low,
            "clock": given(noise.clock),
            "rows": rows,
            "scales": self.scales("perturb", batch),
        }
        return self.device("perturb", tensors=thetas, outs=flat, **beside)

    def lowrank_(self, batch: Batch, factors: Outer, outs: Sequence[Tensor] | None) -> torch.device | None:
        (thetas, spans, *_), (lefts, rights, scales, *_) = batch, factors
        check_rows("lowrank_", spans, outs)
        control = self.control("lowrank_", factors.control)
        if control and outs is not None:
            raise ValueError(f"backend {self.name!r}: lowrank_ has outs and a control; expected one of them")
        if batch.is_scaled:
            raise ValueError(
                "lowrank_: scales is given; expected None, because lowrank_ makes no z: multiply the factors"
            )
        sizes, low = self._batch("lowrank_", batch)
        for what, found in (("left", lefts), ("right", rights), ("scales", scales)):
            self._count("lowrank_", what, found, thetas)
        self.dtypes("lowrank_", "left", lefts, _SINGLE, flat=True)
        self.dtypes("lowrank_", "right", rights, _SINGLE, flat=True)
        rows = self.rows("lowrank_", spans, thetas)
        for i, (theta, span, left, right, size) in enumerate(zip(thetas, spans, lefts, rights, sizes)):
            (m, r), (n, s) = _matrix(left), _matrix(right)
            if r != s or r < 1:
                wanted = f"a matrix with the columns of left, {list(left.shape)}, at least one"
                self._refuse("lowrank_", f"right[{i}]", right, wanted)
            if size and reach(span, theta, size) > m * n:
                wanted = f"elements {span.first} and on within the {m} x {n} of left and right"
                self._refuse("lowrank_", f"tensors[{i}]", theta, wanted)
        ranks = {right.shape[1] for right in rights}
        if self.most_rank is not None and ranks and max(ranks) > self.most_rank:
            raise ValueError(
                f"lowrank_: ranks are {sorted(ranks)}; backend {self.name!r} has 1 to {self.most_rank}, "
                "backends 'cpu' and "
                "'reference' any"
            )
        if outs is not None:
            self._results("lowrank_", "outs", outs, thetas, self._written(spans, thetas, sizes, rows))
        beside = {"outs": outs or (), "residuals": low, "rows": rows, "control": control}
        return self.device("lowrank_", tensors=thetas, left=lefts, right=rights, **beside)

    def linear(self, weight: Weight, sides: Sides, noise: Noise | None) -> None:
        """Checks dtypes, devices and numbers of operands. The product checks the shapes."""
        xs, biases, scales, thins = sides
        draws = () if noise is None else noise.draws
        if (
            not xs
            or len(biases) != len(xs)
            or (noise is not None and not len(xs) == len(scales) == len(draws))
        ):
            counts = f"{len(draws)} draws, {len(scales)} scales and {len(biases)} biases"
            raise ValueError(
                f"backend {self.name!r}: linear: {counts} for {len(xs)} xs; expected one for each, at least "
                "one"
            )
        if len(draws) > 1 and len({step for step, _ in draws}) > 1:
            raise ValueError(f"backend {self.name!r}: linear: draws are {draws}; expected draws of one step")
        tensor, added = weight.tensor, [bias for bias in biases if bias is not None]
        factors = [factor for thin in thins for factor in thin[1:]]
        if (
            self.device_type == "cpu" and tensor.is_cpu and tensor.dtype in FLOATS and tensor.is_contiguous()
            and all([x.is_cpu and x.dtype == tensor.dtype for x in xs])
            and all([bias.is_cpu and bias.dtype in FLOATS for bias in added])
            and all([factor.is_cpu and factor.dtype == torch.float32 for factor in factors])
        ):  # fmt: skip
            return
        self.dtypes("linear", "weight", [tensor], FLOATS, flat=True)
        self.dtypes("linear", "xs", xs, frozenset((tensor.dtype,)), flat=False)
        self.dtypes("linear", "biases", added, FLOATS, flat=False)
        self.dtypes("linear", "factors of thin products", factors, _SINGLE, flat=False)
        self.device("linear", xs=xs, weight=[tensor], biases=added, factors=factors)

    def project(self, projection: Projection) -> torch.device | None:
        losses, weights, scalars = projection
        if self.device_type == "cpu" and losses.dim() == 2 and scalars.shape == (len(PROJECTED),):
            shaped = weights is None or (weights.dim() == 2 and weights.shape[1] == losses.shape[1])
            kinds = [t.dtype == torch.float64 and t.is_cpu and t.is_contiguous() and t.numel() > 0
                     for t in (losses, scalars, losses if weights is None else weights)]  # fmt: skip
            if shaped and all(kinds):
                return CPU
        for what, given_, shape in (("losses", losses, (None, None)),
                                    ("weights", weights, (None, losses.shape[-1])),
                                    ("scalars", scalars, (len(PROJECTED),))):  # fmt: skip
            if given_ is None:
                continue
            fits = given_.dim() == len(shape) and all(
                n == m for n, m in zip(given_.shape, shape) if m is not None
            )
            if given_.dtype != torch.float64 or not fits or not given_.numel() or not given_.is_contiguous():
                named = ", ".join("any" if size is None else str(size) for size in shape)
                self._refuse("project", what, given_, f"contiguous float64[{named}], with an element or more")
        return self.device("project", losses=[losses], weights=given(weights), scalars=[scalars])

    def philox4x32(self, counter: Tensor) -> torch.device | None:
        if counter.dtype != torch.int64 or counter.dim() != 2 or counter.shape[1] != 4:
            self._refuse("philox4x32", "counter", counter, "int64[n, 4]")
        return self.device("philox4x32", counter=[counter])


def check_rows(verb: str, spans: Sequence[Span], outs: Sequence[Tensor] | None) -> None:
    """Refuses looked-up rows without outs: a row that is looked up twice would be changed twice."""
    if outs is not None or (isinstance(spans, SpanList) and spans.plain):
        return
    for i, span in enumerate(spans):
        if span.rows is not None:
            raise ValueError(
                f"{verb}: spans[{i}] has rows and there are no outs; looked-up rows are written to outs only"
            )


def reach(span: Span, theta: Tensor, size: int) -> int:
    """Returns the number behind the last element of a tensor, 0 for looked-up rows."""
    if span.rows is not None:
        return 0
    if span.pitch is None:
        return span.first + size
    return span.first + (theta.shape[0] - 1) * span.pitch + theta.shape[1]


def _matrix(factor: Tensor) -> tuple[int, int]:
    return (factor.shape[0], factor.shape[1]) if factor.dim() == 2 else (0, 0)


__all__ = ["Validator", "check_rows"]
