"""Options: what an optimizer's constructor and its parameter groups accept."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import finite_number
from ..directions import LowRank
from ..estimator import Estimator, Spsa, Stencil
from ..guards import Guards
from ..rule import Rule, Sgd

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
HINTS = {
    "momentum": "rule=zokern.Momentum(0.9)", "betas": "rule=zokern.Adam(betas=...)", "epsilon": "eps=...",
    "mu": "eps=...",
    "beta": "rule=zokern.Momentum(...)", "nesterov": "rule=zokern.Momentum(...)", "wd": "weight_decay=...",
    "clip": "estimator=zokern.Spsa(clip=...)", "normalize": "estimator=zokern.Spread(...)",
}  # fmt: skip
GUARDS = {option.name for option in dataclasses.fields(Guards)}


def guards_of(cls: type, given: dict[str, Any]) -> Guards:
    """Returns the guards; TypeError, with the options that a class has, for a name that is none of theirs."""
    if unknown := given.keys() - GUARDS:
        raise _unknown(cls, min(unknown))
    return Guards(**given)


def _unknown(cls: type, option: str) -> TypeError:
    """An error that names the class that the user called, and what is near."""
    options = [
        name
        for owner in cls.__mro__
        if issubclass(owner, torch.optim.Optimizer) and owner is not torch.optim.Optimizer
        for name, p in inspect.signature(owner.__init__).parameters.items()
        if name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    known = sorted({*options, *GUARDS})
    near = difflib.get_close_matches(option, known, 1)
    hint = HINTS.get(option) or (f"{near[0]}=..." if near else "")
    return TypeError(
        f"{cls.__name__} has no option {option!r}"
        + (f"; did you mean {hint}?" if hint else ";")
        + f" The options are {', '.join(known)}"
    )


def check_launches(rounding: Any, backend: Any) -> None:
    """Refuses another rounding, and a backend that is not known or is off."""
    if rounding not in backends.ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; expected one of {list(backends.ROUNDINGS)}")
    if backend is not None:
        backends.resolve(backend, torch.device("cpu"))


def rule_of(given: Any) -> Rule:
    """Returns a rule; None: SGD. Raises TypeError for what is no rule object."""
    rule = Sgd() if given is None else given
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rule is {rule!r}; expected None, zokern.Momentum(), zokern.Adam() or another zokern.Rule object"
        )
    return rule


def estimator_of(given: Estimator | None, queries: int | None, stencil: str | Stencil | None) -> Estimator:
    """Returns a copy of the estimator, as it is before a run; without one, SPSA with the queries and the
    stencil."""
    if given is None:
        return Spsa(1 if queries is None else queries, "central" if stencil is None else stencil)
    for name, value in (("queries", queries), ("stencil", stencil)):
        if value is not None:
            raise ValueError(
                f"{name} is {value!r} beside an estimator; give it to the estimator: "
                f"zokern.Spsa({name}={value!r})"
            )
    if not isinstance(given, Estimator):
        raise TypeError(
            f"estimator is {given!r}; expected None, zokern.Spsa() or another zokern.Estimator object"
        )
    return given.fresh()


def default_lr(rule: Rule, estimator: Estimator) -> float:
    """Returns the lr of an optimizer that is given none.

    A rule whose steps have one length, whatever the slope, knows its own."""
    return rule.lr or estimator.lr


def check_group(options: dict[str, Any]) -> None:
    """Refuses lr, eps and weight decay of a group that are out of range.

    Schedulers and users write them, so that every step asks."""
    for name in ("lr", "eps", "weight_decay"):
        _check_scalar(name, options[name])
    lr = finite_number("lr", options["lr"])
    if lr < 0:
        raise ValueError(f"lr is {options['lr']!r}; expected lr >= 0 (to ascend, pass maximize=True)")
    eps = finite_number("eps", options["eps"], above=0.0)
    if not SMALLEST <= eps <= LARGEST:
        raise ValueError(
            f"eps is {options['eps']!r}; expected a finite number > 0 that float32 holds: 2**-126 <= eps < "
            "2**128"
        )
    decay = finite_number("weight_decay", options["weight_decay"], minimum=0.0)
    if lr * decay > 1.0:
        raise ValueError(
            f"weight_decay is {decay!r} and lr is {lr!r}; expected lr * weight_decay of at most 1, beyond "
            "which weights change their sign in every step"
        )


def keep_lr(given: dict[str, Any], tensors: Iterable[Tensor], rule: Rule, factored: LowRank | None) -> None:
    """Sets `share` to 1 in a new group that has its own lr and no matrix, so that this lr is used unscaled.

    given  what the group was given, to which `share` is added (zokern.Rule)"""
    if rule.share != 1.0 and "lr" in given and factored is not None and not any(map(factored.shape, tensors)):
        given.setdefault("share", 1.0)


def _check_scalar(name: str, value: Any) -> None:
    """Refuses what float() has no word for: tensors of several elements, and integers beyond a float."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex() or value.is_meta):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} is {value!r:.40}; expected a finite number below 2**128")


__all__ = ["check_group", "check_launches", "default_lr", "estimator_of", "guards_of", "rule_of"]
