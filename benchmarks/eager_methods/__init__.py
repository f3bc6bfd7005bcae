"""Holds the eager loops of the methods, as their public code does them. A loop has the name of its method.

A loop adds the z of a parameter to the weights, made again from the step's seed in each pass: four passes for
a difference, and three where one side is read. Each file lists what its loops do otherwise. A reference's
fault that changes what is computed is left out, and the loop says so. `zokern/methods/` names the papers.

A new file of this folder is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil

from zokern.methods import METHODS

from .loop import Closure, Loop


def find() -> dict[str, type[Loop]]:
    """Returns the loops of this folder's files, by the name of their method."""
    found: dict[str, type[Loop]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Loop) and value.__module__ == module.__name__
        }
    return {name: loop for name, loop in sorted(found.items()) if name in METHODS}


LOOPS = find()

__all__ = ["LOOPS", "Closure", "Loop", "find"]
