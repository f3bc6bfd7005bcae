"""Checks of the operands of a launch, list by list: dtypes, devices, sizes and layouts.

A right list costs a comparison of columns; a wrong one is searched tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .base import DIRECTIONS, ROUNDINGS
from .launch import Batch, Span
from .lists import SpanList

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
_LOW = frozenset((torch.int16,))
SCALES = frozenset((torch.float32, torch.bfloat16, torch.bool))
CPU = torch.device("cpu")


def _named(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def described(tensor: Tensor) -> str:
    """Returns dtype, shape and device of a tensor for an error, and strides if it is not contiguous."""
    if tensor.layout != torch.strided:
        return f"{tensor.dtype}{list(tensor.shape)} with layout {tensor.layout} on {tensor.device}"
    how = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"{tensor.dtype}{list(tensor.shape)}{how} on {tensor.device}"


def given(tensor: Tensor | None) -> list[Tensor]:
    """Returns the tensor in a list, or an empty one."""
    return [] if tensor is None else [tensor]


class Operands:
    """Checks the operands of one backend.

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
            return CPU
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


__all__ = ["CPU", "FLOATS", "Operands", "described", "given"]
