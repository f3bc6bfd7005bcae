"""The names of the evaluations, and what a reading must be: right against hand-written weights, or refused.

Only `zokern.draw` is taken from the library, whose stream has tests of its own.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from zokern.stream import BASIS, draw_word

EXPLICIT = ("master", "paired", "scratch", "inplace")
METHODS = dict(zokern.methods.METHODS)
OFFSETS = {"central": (1.0, -1.0), "forward": (1.0, 0.0)}
REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError)
OURS = str(Path(zokern.__file__).parent)


def defaults() -> dict[str, Any]:
    """The evaluation that each method takes when none is named."""
    given = {
        name: [inspect.signature(owner.__init__).parameters.get("evaluation") for owner in method.__mro__]
        for name, method in METHODS.items()
    }
    return {name: next(one.default for one in found if one is not None) for name, found in given.items()}


# 'auto' is a way of its own only while some method has another default.
WAYS = ("default", *EXPLICIT, *(() if set(defaults().values()) == {"auto"} else ("auto",)))


def optimizer(method: str, params: Any, way: str, **options: Any) -> Any:
    """The method's optimizer, with the evaluation named or left to the method."""
    return METHODS[method](params, **options, **({} if way == "default" else {"evaluation": way}))


def trained(params: Any) -> dict[str, Tensor]:
    """The tensors that are trained, by the name that decides their z."""
    named = params.named_parameters() if isinstance(params, nn.Module) else params
    return {name: p for name, p in named if p.requires_grad}


def clones(params: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(params).items()}


# The oracle -------------------------------------------------------------------------------------------------


def orthonormal(x: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R."""
    q, r = torch.linalg.qr(x.double())
    return q * r.diagonal().sign()


def dense(
    name: str, shape: Sequence[int], seed: int, step: int, query: int, direction: str = "normal"
) -> Tensor:
    return zokern.draw(direction, tuple(shape), seed=seed, who=name, step=step, draw=query).double()


def subspace(name: str, shape: Sequence[int], seed: int, step: int, query: int, rank: int = 8) -> Tensor:
    """SubZero's z in the first interval: sqrt(m n) / r U Z V^T for a matrix, dense for the rest."""
    long = [side for side in shape if side != 1]
    if len(long) != 2:
        return dense(name, shape, seed, step, query)
    rank = min(rank, *long)
    u, v = (orthonormal(dense(name, (n, rank), seed, 0, draw_word(k, BASIS))) for k, n in enumerate(long))
    core = dense(name, (rank, rank), seed, step, query)
    return (u @ core @ v.T * (math.sqrt(long[0] * long[1]) / rank)).reshape(tuple(shape))


def lazy(name: str, shape: Sequence[int], seed: int, step: int, query: int, rank: int = 2) -> Tensor:
    """LOZO's z in the first interval: U V^T / sqrt(r) for a matrix, dense for the rest."""
    if len(shape) != 2:
        return dense(name, shape, seed, step, query)
    rank = min(rank, *shape)
    u = dense(name, (shape[0], rank), seed, step, query)
    return u @ dense(name, (shape[1], rank), seed, 0, draw_word(1, BASIS)).T / math.sqrt(rank)


def direction(method: str, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """z of a method with these options, as a function of name, shape, seed, step and query."""
    if method in ("SubZero", "LOZO"):
        return functools.partial(subspace if method == "SubZero" else lazy, **options)
    kind = options.get("direction", "rademacher" if method == "FZOO" else "normal")
    return lambda *where: dense(*where, direction=kind)


@torch.no_grad()
def write(
    params: Any, theta: Mapping[str, Tensor], amount: float, z: Callable[..., Tensor], *where: int
) -> None:
    """theta + amount z into the weights: one rounding to their dtype."""
    for name, p in trained(params).items():
        moved = theta[name].double()
        if amount:
            moved = moved + amount * z(name, tuple(p.shape), *where)
        p.copy_(moved.to(p.dtype))


# Refusals ---------------------------------------------------------------------------------------------------


def raised_by_zokern(error: BaseException) -> bool:
    """Whether the last frame of the traceback is the package's own."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_filename.startswith(OURS)


def check_refusal(error: Exception) -> None:
    """A refusal by name has a plain type and says something; zokern's own says which way reads everything."""
    assert isinstance(error, REFUSALS), f"{type(error).__name__} is not a refusal: {error}"
    text = str(error)
    assert len(text) > 20, f"{type(error).__name__} says only {text!r}"
    if raised_by_zokern(error):
        assert "evaluation='master'" in text, f"zokern's refusal does not name the way out: {text}"


def check_weights(params: Any, before: Mapping[str, Tensor], way: str, steps: int = 1) -> None:
    """Every trained weight has its bits. In place they come back by arithmetic, up to a few roundings."""
    for name, p in trained(params).items():
        now, old = p.detach(), before[name]
        assert now.dtype == old.dtype and now.shape == old.shape, name
        if way != "inplace":
            same = torch.equal(now.reshape(-1).view(torch.uint8), old.reshape(-1).view(torch.uint8))
            assert same, f"{name} lost its bits under {way}: by {(now - old).abs().max():.3g}"
            continue
        bound = 4 * steps * torch.finfo(old.dtype).eps * (old.abs() + old.abs().max() * 0.1 + 0.1)
        assert bool(((now - old).abs() <= bound).all()), f"{name} drifted by {(now - old).abs().max():.3g}"


def fallbacks(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Warnings that say that another evaluation is taken."""
    return [
        str(w.message)
        for w in caught
        if issubclass(w.category, RuntimeWarning) and "evaluation" in str(w.message)
    ]
