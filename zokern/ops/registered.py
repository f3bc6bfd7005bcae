"""Helpers of the operations that torch.library registers: seeds are signed there, and lists of pairs are two lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import SpanList, TensorList
from ..stream import check_seed
from . import arguments
from .aliasing import shared_memory
from .operands import check_list, spans_of

_SIGN = 1 << 63  # torch.library integers are signed: seeds travel as two's complement


def wrap_seed(seed: int) -> int:
    """A checked seed as the signed integer that torch.library takes."""
    seed = check_seed(seed)
    return seed - 2 * _SIGN if seed >= _SIGN else seed


def unwrap_seed(seed: int) -> int:
    """The seed again."""
    return seed % (2 * _SIGN)


def traced() -> bool:
    """Whether someone looks at operations rather than values: then the registered operation has to be called, not its kernel."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def listed(verb: str, thetas: Sequence[Tensor], who: Sequence[int], first: Sequence[int]) -> tuple[TensorList, SpanList]:
    """Tensors and spans of a registered operation, which is called past its verb: by a compiled graph, or by hand."""
    tensors = TensorList(thetas)
    spans = spans_of(verb, tensors, list(who), list(first))
    check_list(verb, tensors, spans)
    if (pair := shared_memory(tensors)) is not None:
        raise ValueError(f"{verb}: tensors[{pair[0]}] and tensors[{pair[1]}] share memory; expected distinct tensors")
    return tensors, spans


def terms_of(verb: str, steps: Sequence[int], draws: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (step, draw) of a registered operation."""
    if len(steps) != len(draws):
        raise ValueError(f"{verb}: {len(steps)} steps and {len(draws)} draws; expected as many of each")
    return arguments.draws(verb, list(zip(steps, draws)))
