"""The tuples of a launch from a verb's arguments: checked tensors, names, residuals, results, clock."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import directions
from ..backends import ROUNDINGS, Batch, Noise, Span, SpanList, TensorList
from ..backends.operands import FLOATS
from ..stream import INDEX_LIMIT, check_seed, check_word, parameter_id
from . import arguments
from .aliasing import FEW, overlaps_itself, shared_memory
from .arguments import is_text

NO_MEMORY = {"meta"}  # kinds of devices whose tensors have no values; a recorder of launches takes them


def batch_of(verb: str, tensors, who, first, rounding: str, residuals, alone: bool = True) -> Batch:
    """Returns the tensors of a launch, checked. alone: they have to be apart in memory."""
    tensors = arguments.tensor_list("tensors", tensors)
    spans = spans_of(verb, tensors, who, first)
    check_list(verb, tensors, spans)
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    check_rounding(verb, tensors, rounding, low)
    if alone and (pair := shared_memory(tensors)) is not None:
        raise ValueError(
            f"{verb}: tensors[{pair[0]}] and tensors[{pair[1]}] share memory; expected distinct tensors"
        )
    return Batch(tensors, spans, rounding, low or None)


def noise_of(verb: str, direction, seed: int, draws, clock: Tensor | None, device: torch.device) -> Noise:
    """Returns the random numbers of a launch, checked."""
    direction, draws = directions.resolve(direction), arguments.draws(verb, draws)
    check_clock(verb, clock, device)
    return Noise(direction, check_seed(seed), draws, clock)


def word_of(who: str | int) -> int:
    """Returns a parameter's id: that of a name, or the id itself."""
    return parameter_id(who) if isinstance(who, str) else check_word("who", who)


def wrote(batch: Batch, *others: Tensor) -> None:
    """Adds to the version counters of tensors that a kernel wrote through raw pointers."""
    torch.autograd.graph.increment_version([*batch.tensors, *(batch.residuals or ()), *others])


def check_tensor(verb: str, what: str, tensor: Tensor, first: int = 0, hint: str = "cast it first") -> None:
    """Refuses a tensor that no verb can read or write."""
    if tensor.device.type in NO_MEMORY:
        raise ValueError(
            f"{verb}: {what} is on the meta device and has no elements; expected a tensor with memory: "
            "materialise it"
        )
    if tensor.dtype not in FLOATS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{verb}: {what} is {dtype} on {tensor.device}; expected float32, bfloat16 or float16: {hint}"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{verb}: {what} has layout {tensor.layout}; expected a strided tensor: {hint}")
    if overlaps_itself(tensor):
        raise ValueError(
            f"{verb}: {what} has overlapping elements (strides {tensor.stride()}); expected one element per "
            "address: .clone() it"
        )
    if not 0 <= first or first + tensor.numel() > INDEX_LIMIT:
        raise ValueError(
            f"{verb}: {what} spans elements {first} to {first + tensor.numel()}; expected 0 <= first and "
            "first + n <= 2**35"
        )


def spans_of(verb: str, tensors: Sequence[Tensor], who, first) -> SpanList:
    """Returns the spans of tensors. who: names or ids. first: one number for all, or a list."""
    one = isinstance(who, (str, numbers.Integral))
    if isinstance(who, bool) or (not one and (is_text(who) or not isinstance(who, Iterable))):
        raise ValueError(
            f"{verb}: who is {who!r}; expected the parameter's name, or a list with one name per tensor"
        )
    several = isinstance(first, Iterable) and not is_text(first)
    if not several and (isinstance(first, bool) or not isinstance(first, numbers.Integral)):
        raise ValueError(
            f"{verb}: first is {first!r}; expected the number of the first element, or a list with one per "
            "tensor"
        )
    whos = [who] * len(tensors) if one else list(who)
    if one and len(tensors) > 1:
        raise ValueError(
            f"{verb}: who is {who!r} for {len(tensors)} tensors; expected one name per tensor, or they would "
            "share one z"
        )
    firsts = list(first) if several else [int(first)] * len(tensors)
    for f in firsts if several else ():
        if isinstance(f, bool) or not isinstance(f, numbers.Integral):
            raise ValueError(
                f"{verb}: first is {first!r:.80}; expected the numbers of the first elements, one integer "
                "per tensor"
            )
    if several:
        firsts = list(map(int, firsts))
    if len(whos) != len(tensors) or len(firsts) != len(tensors):
        raise ValueError(
            f"{verb}: {len(tensors)} tensors, {len(whos)} names and {len(firsts)} offsets; expected as many "
            "of each"
        )
    return _span_list(tuple(whos), tuple(firsts))


@lru_cache(maxsize=256)
def _span_list(whos: tuple, firsts: tuple) -> SpanList:
    """Keeps the spans: a loop names the same list of parameters at every step."""
    return SpanList(Span(word_of(who), first) for who, first in zip(whos, firsts))


def check_list(verb: str, tensors: TensorList, spans: SpanList) -> None:
    """Refuses tensors that no verb takes, or that lie on several devices.

    A long right list costs a comparison of columns."""
    if not tensors:
        raise ValueError(f"{verb}: tensors is empty; expected at least one tensor")
    device = tensors[0].device
    if tensors.devices != {device}:
        i, other = next((i, t.device) for i, t in enumerate(tensors) if t.device != device)
        raise ValueError(
            f"{verb}: tensors[{i}] is on {other} and tensors[0] on {device}; expected one device a call"
        )
    if len(tensors) <= FEW or not _is_plain(tensors, spans):
        for i, (tensor, span) in enumerate(zip(tensors, spans)):
            check_tensor(verb, f"tensors[{i}]", tensor, span.first)


def _is_plain(tensors: TensorList, spans: SpanList) -> bool:
    """Tells whether every tensor of a list is right at a glance."""
    kinds = set(tensors.dtypes) <= FLOATS and tensors[0].device.type not in NO_MEMORY
    return kinds and tensors.contiguous and spans.at_zero and tensors.sizes.max() <= INDEX_LIMIT


def check_out(
    verb: str, what: str, out: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuses a result of another shape, dtype or device, or one that is not contiguous."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{verb}: {what} is {type(out).__name__} {out!r:.80}; expected a torch.Tensor")
    there = out.device == device or (out.device.type == device.type and device.index is None)
    if (
        out.shape != shape
        or out.dtype != dtype
        or not there
        or out.layout != torch.strided
        or not out.is_contiguous()
    ):
        where = f"{out.dtype}{list(out.shape)} on {out.device}" + (
            "" if out.is_contiguous() else " and not contiguous"
        )
        raise ValueError(f"{verb}: {what} is {where}; expected contiguous {dtype}{list(shape)} on {device}")


def check_clock(verb: str, clock: Tensor | None, device: torch.device) -> None:
    """Refuses a clock that is not int64[1] on the device."""
    if clock is None:
        return
    arguments.tensor(verb, "clock", clock, ", int64[1], or None")
    if clock.dtype != torch.int64 or clock.numel() != 1 or clock.device.type != device.type:
        raise ValueError(
            f"{verb}: clock is {clock.dtype}{list(clock.shape)} on {clock.device}; expected int64[1] on "
            f"{device}"
        )


def check_control(verb: str, control: Tensor | None, device: torch.device) -> None:
    """Refuses a control that is not float32[3] on the device."""
    if control is None:
        return
    arguments.tensor(verb, "control", control, ", the control of zokern.project, or None")
    plain = control.dtype == torch.float32 and control.shape == (3,) and control.is_contiguous()
    if not plain or control.device != device:
        where = f"{control.dtype}{list(control.shape)} on {control.device}"
        raise ValueError(f"{verb}: control is {where}; expected float32[3] of zokern.project on {device}")


def check_rounding(verb: str, tensors: Sequence[Tensor], rounding: str, residuals: Sequence[Tensor]) -> None:
    """Refuses another rounding, and residuals that are missing, misshapen or not asked for."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{verb}: rounding is {rounding!r}; expected one of {list(ROUNDINGS)}")
    if rounding != "residual":
        if residuals:
            raise ValueError(
                f"{verb}: residuals given with rounding={rounding!r}; expected rounding='residual'"
            )
        return
    if any(t.dtype != torch.bfloat16 for t in tensors):
        raise ValueError(
            f"{verb}: rounding='residual' needs bfloat16 tensors (their 16 low bits make a float32); others: "
            "'stochastic'"
        )
    if len(residuals) != len(tensors):
        raise ValueError(
            f"{verb}: {len(residuals)} residuals for {len(tensors)} tensors; expected int16 tensors, zeros "
            "to start with"
        )
    for i, (tensor, low) in enumerate(zip(tensors, residuals)):
        if (
            low.dtype != torch.int16
            or low.shape != tensor.shape
            or not low.is_contiguous()
            or low.device != tensor.device
        ):
            raise ValueError(
                f"{verb}: residuals[{i}] is {low.dtype}{list(low.shape)}; expected contiguous "
                f"int16{list(tensor.shape)} beside it"
            )
