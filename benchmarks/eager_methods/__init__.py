"""Holds the eager loops of the methods, as their public code does them. A loop has the name of its method.

A loop adds the z of a parameter to the weights, made again from the step's seed in each pass: four passes for
a difference, and three where one side is read. Each file lists what its loops do otherwise. A reference's
fault that changes what is computed is left out, and the loop says so. `zokern/methods/` names the papers.

A new file of this folder is found by itself. A method made of zokern.Spsa, a dense direction and zokern.Sgd
needs none: its loop is made of its stencil and its queries.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from zokern import Sgd, Spsa
from zokern.directions import Normal, Rademacher
from zokern.methods import METHODS

from .loop import Closure, Differences, Loop


def find() -> dict[str, type[Loop]]:
    """Returns the loops by the name of their method: this folder's, and those made of parts."""
    found: dict[str, type[Loop]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Loop) and value.__module__ == module.__name__
        }
    for name in METHODS.keys() - found.keys():
        if (made := of_parts(METHODS[name])) is not None:
            found[name] = made
    return {name: loop for name, loop in sorted(found.items()) if name in METHODS}


def of_parts(method: Callable[..., Any]) -> type[Loop] | None:
    """Returns the loop of a method at its defaults, or None where its parts are others than Spsa, Sgd and a
    dense direction. A schedule is left out: it costs nothing."""
    made = method(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    dense = made.factored is made.scaled is None and type(made.direction) in (Normal, Rademacher)
    if not dense or type(made.estimator) is not Spsa or type(made.rule) is not Sgd:
        return None
    stencil = made.estimator.stencil
    values = {
        "queries": made.estimator.queries,
        "offsets": stencil.offsets,
        "weights": stencil.weights,
        "rademacher": type(made.direction) is Rademacher,
    }
    return type(type(made).__name__, (Differences,), values)


LOOPS = find()

__all__ = ["LOOPS", "Closure", "Loop", "find", "of_parts"]
