"""Validation of a launch: dtypes, devices and sizes are checked before a kernel takes a pointer.

Kernels read an address as the type and size that the contract names (base.py). A tensor of another dtype,
device or size would be read wrongly, or beyond its end. The public verbs check their arguments with better
words. A step, a rule and an operation of torch.ops.zokern come straight here. A right call costs a
comparison of columns; a wrong one is searched tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .base import DIRECTIONS, ROUNDINGS, SCALARS, STATES
from .launch import PROJECTED, Batch, Noise, Outer, Projection, Sides, Span, Terms, Update, Weight
from .lists import SpanList

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
_SINGLE = frozenset((torch.float32,))
_LOW = frozenset((torch.int16,))
SCALES = frozenset((torch.float32, torch.bfloat16, torch.bool))
_CPU = torch.device("cpu")


def _named(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def described(tensor: Tensor) -> str:
    """Returns dtype, shape and device of a tensor for an error, and strides if it is not contiguous."""
    if tensor.layout != torch.strided:
        return f"{tensor.dtype}{list(tensor.shape)} with layout {tensor.layout} on {tensor.device}"
    how = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"{tensor.dtype}{list(tensor.shape)}{how} on {tensor.device}"


class Validator:
    """Checks the calls of one backend.

    name         of the backend, for its errors
    device_type  of the tensors that it takes ('cpu', 'cuda'); None: any that has memory
    most_rank    of the factors that its lowrank_ takes; None: any
    """

    def __init__(self, name: str, device_type: str | None, most_rank: int | None = None) -> None:
        self.name, self.device_type, self.most_rank = name, device_type, most_rank

    def number(self, direction: Any) -> int:
        """Returns the number of a direction in the compiled kernels."""
        number = DIRECTIONS.get(direction.name)
        if number is None:
            raise NotImplementedError(
                f"direction {direction.name!r} has no compiled kernel; backend {self.name!r} has "
                f"{sorted(DIRECTIONS)}, "
                "backend 'reference' takes any direction"
            )
        return number

    def _refuse(self, verb: str, what: str, tensor: Tensor, expected: str) -> NoReturn:
        raise ValueError(f"backend {self.name!r}: {verb}: {what} is {described(tensor)}; expected {expected}")

    def device(self, verb: str, **groups: Sequence[Tensor]) -> torch.device | None:
        """Returns the one device of all tensors, None where there are none."""
        tensors = [tensor for group in groups.values() for tensor in group]
        if self.device_type == "cpu" and all([tensor.is_cpu for tensor in tensors]):
            return _CPU
        found = {tensor.device for tensor in tensors}
        if len(found) == 1:
            (device,) = found
            if device.type == self.device_type or (self.device_type is None and device.type != "meta"):
                return device
        first: torch.device | None = None
        for what, group in groups.items():
            for i, tensor in enumerate(group):
                kind = tensor.device.type
                if kind == "meta" or (self.device_type is not None and kind != self.device_type):
                    wanted = (
                        "a tensor with memory" if self.device_type is None else f"a {self.device_type} tensor"
                    )
                    self._refuse(verb, f"{what}[{i}]", tensor, wanted)
                first = first or tensor.device
                if tensor.device != first:
                    self._refuse(verb, f"{what}[{i}]", tensor, f"{first}, as the others")
        return first

    def dtypes(
        self, verb: str, what: str, tensors: Sequence[Tensor], allowed: frozenset[torch.dtype], flat: bool
    ) -> None:
        """Refuses other dtypes, and, where `flat`, tensors that are not contiguous."""
        if all([t.dtype in allowed for t in tensors]) and (
            not flat or all([t.is_contiguous() for t in tensors])
        ):
            return
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in allowed or (flat and not tensor.is_contiguous()):
                self._refuse(
                    verb, f"{what}[{i}]", tensor, ("a contiguous " if flat else "") + _named(allowed)
                )

    def sizes(self, verb: str, what: str, tensors: Sequence[Tensor], wanted: Sequence[int]) -> None:
        """Refuses a list of other tensors than one for each number of elements."""
        found = list(map(Tensor.numel, tensors))
        if found == wanted:
            return
        if len(found) != len(wanted):
            raise ValueError(
                f"backend {self.name!r}: {verb}: {what} has {len(found)} tensors for {len(wanted)}; expected "
                "one for each"
            )
        i = next(i for i, (a, b) in enumerate(zip(found, wanted)) if a != b)
        self._refuse(
            verb, f"{what}[{i}]", tensors[i], f"{wanted[i]} elements, as many as the tensor that it goes with"
        )

    def clock(self, verb: str, clock: Tensor | None) -> None:
        if clock is not None and (clock.dtype != torch.int64 or clock.numel() != 1):
            self._refuse(verb, "clock", clock, "int64[1]")

    def control(self, verb: str, control: Tensor | None) -> list[Tensor]:
        """Returns {decay, go, finite} in a list, checked; an empty one where a call has none."""
        if control is None:
            return []
        if control.dtype != torch.float32 or control.shape != (3,) or not control.is_contiguous():
            self._refuse(verb, "control", control, "contiguous float32[3], as project() makes it")
        return [control]

    def rows(self, verb: str, spans: Sequence[Span], thetas: Sequence[Tensor]) -> list[Tensor]:
        """Returns the lists of looked-up rows, checked; a Span with rows or a pitch goes with a matrix."""
        if (
            spans.plain
            if isinstance(spans, SpanList)
            else all([s.rows is None and s.pitch is None for s in spans])
        ):
            return []
        found = []
        for i, (span, theta) in enumerate(zip(spans, thetas)):
            if span.rows is None and span.pitch is None:
                continue
            if theta.dim() != 2:
                self._refuse(verb, f"tensors[{i}]", theta, "a matrix, because its span has rows or a pitch")
            if span.rows is not None:
                if span.rows.dtype != torch.int64 or not span.rows.is_contiguous():
                    self._refuse(verb, f"spans[{i}].rows", span.rows, "contiguous int64 row numbers")
                found.append(span.rows)
        return found

    def numbers(self, verb: str, what: str, tensor: Tensor, count: int) -> None:
        """Refuses anything but float32[count]."""
        if tensor.dtype != torch.float32 or tensor.numel() != count or tensor.dim() != 1:
            self._refuse(verb, what, tensor, f"float32[{count}]")

    def fits(
        self,
        device: torch.device,
        numbers: Sequence[tuple[Tensor, int]],
        clock: Tensor | None = None,
        control: Tensor | None = None,
    ) -> bool:
        """Tells whether the numbers of a call are right for lists that were checked before.

        If not, the checks of the verb say why.

        numbers  tensors, each with its count"""
        for tensor, count in numbers:
            if tensor.dtype != torch.float32 or tensor.shape != (count,) or tensor.device != device:
                return False
        if clock is not None and (clock.dtype != torch.int64 or clock.numel() != 1 or clock.device != device):
            return False
        return control is None or (
            control.dtype == torch.float32
            and control.shape == (3,)
            and control.is_contiguous()
            and control.device == device
        )

    def scales(self, verb: str, batch: Batch, drawn: bool = False) -> list[Tensor]:
        """Returns the factors of z, checked.

        drawn  the tensors are results, so that looked-up rows are those of the factors: any number of them"""
        thetas, spans, _, _, scales = batch
        if scales is None:
            return []
        self._count(verb, "scales", scales, thetas)
        found = []
        for i, (theta, span, scale) in enumerate(zip(thetas, spans, scales)):
            if scale is None:
                continue
            free = drawn and span.rows is not None and theta.dim() == scale.dim() == 2
            fits = scale.shape[1:] == theta.shape[1:] if free else scale.shape == theta.shape
            if scale.dtype not in SCALES or not scale.is_contiguous() or not fits:
                shape = ", ".join(map(str, theta.shape))
                wanted = f"a contiguous {_named(SCALES)}[{shape}], shaped like tensors[{i}]"
                self._refuse(verb, f"scales[{i}]", scale, wanted)
            found.append(scale)
        return found

    def _batch(self, verb: str, batch: Batch) -> tuple[list[int], Sequence[Tensor]]:
        """Checks the tuple that every verb has.

        Returns the elements of each tensor, and the low bits that a kernel would read."""
        thetas, spans, rounding, residuals, _ = batch
        self._count(verb, "spans", spans, thetas)
        if rounding not in ROUNDINGS:
            raise ValueError(
                f"backend {self.name!r}: {verb}: rounding is {rounding!r}; expected one of {list(ROUNDINGS)}"
            )
        self.dtypes(verb, "tensors", thetas, FLOATS, flat=False)
        sizes = list(map(Tensor.numel, thetas))
        if residuals is None:
            return sizes, ()
        self._count(verb, "residuals", residuals, thetas)
        # others have no low bits
        mine = [i for i, theta in enumerate(thetas) if theta.dtype == torch.bfloat16]
        low = [residuals[i] for i in mine]
        self.dtypes(verb, "residuals", low, _LOW, flat=True)
        self.sizes(verb, "residuals", low, [sizes[i] for i in mine])
        return sizes, low

    def _count(self, verb: str, what: str, found: Sequence, thetas: Sequence[Tensor]) -> None:
        if len(found) != len(thetas):
            raise ValueError(
                f"backend {self.name!r}: {verb}: {what} has {len(found)} members for {len(thetas)} tensors; "
                "expected one for each"
            )

    def _written(
        self, spans: Sequence[Span], thetas: Sequence[Tensor], sizes: list[int], rows: list[Tensor]
    ) -> list[int]:
        """Returns the elements of each result: those of the rows that are looked up, where there are any."""
        if not rows:
            return sizes
        pairs = zip(spans, thetas, sizes)
        return [size if s.rows is None else s.rows.numel() * t.shape[1] for s, t, size in pairs]

    def _is_sound(
        self, thetas: Sequence[Tensor], spans: Sequence[Span], results: Sequence[Sequence[Tensor]]
    ) -> bool:
        """Tells whether a call has whole CPU tensors, and results of the same dtypes, only.

        This is the common call, and the question takes less time than the checks."""
        if self.device_type != "cpu" or len(spans) != len(thetas):
            return False
        if not all([t.is_cpu and t.dtype in FLOATS for t in thetas]):
            return False
        for side in results:
            if len(side) != len(thetas):
                return False
            for t, o in zip(thetas, side):
                if not (o.is_cpu and o.dtype == t.dtype and o.is_contiguous() and o.numel() == t.numel()):
                    return False
        return (
            spans.plain
            if isinstance(spans, SpanList)
            else all([s.rows is None and s.pitch is None for s in spans])
        )

    # The verbs ----------------------------------------------------------------------------------------------

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
            return _CPU
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
            return _CPU
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

    def _results(
        self, verb: str, what: str, outs: Sequence[Tensor], thetas: Sequence[Tensor], wanted: list[int]
    ) -> None:
        self.sizes(verb, what, outs, wanted)
        if all(
            [
                (o.dtype == t.dtype or o.dtype == torch.float32) and o.is_contiguous()
                for o, t in zip(outs, thetas)
            ]
        ):
            return
        for i, (out, theta) in enumerate(zip(outs, thetas)):
            if out.dtype not in (theta.dtype, torch.float32) or not out.is_contiguous():
                self._refuse(
                    verb, f"{what}[{i}]", out, f"a contiguous {_named({theta.dtype, torch.float32})}"
                )

    def project(self, projection: Projection) -> torch.device | None:
        losses, weights, scalars = projection
        if self.device_type == "cpu" and losses.dim() == 2 and scalars.shape == (len(PROJECTED),):
            shaped = weights is None or (weights.dim() == 2 and weights.shape[1] == losses.shape[1])
            kinds = [t.dtype == torch.float64 and t.is_cpu and t.is_contiguous() and t.numel() > 0
                     for t in (losses, scalars, losses if weights is None else weights)]  # fmt: skip
            if shaped and all(kinds):
                return _CPU
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


def given(tensor: Tensor | None) -> list[Tensor]:
    """Returns the tensor in a list, or an empty one."""
    return [] if tensor is None else [tensor]


def reach(span: Span, theta: Tensor, size: int) -> int:
    """Returns the number behind the last element of a tensor, 0 for looked-up rows."""
    if span.rows is not None:
        return 0
    if span.pitch is None:
        return span.first + size
    return span.first + (theta.shape[0] - 1) * span.pitch + theta.shape[1]


def _matrix(factor: Tensor) -> tuple[int, int]:
    return (factor.shape[0], factor.shape[1]) if factor.dim() == 2 else (0, 0)


__all__ = ["FLOATS", "Validator", "check_rows", "described", "given"]
