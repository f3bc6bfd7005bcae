"""Warnings that point at the user's own line, however many of zokern's and torch's frames lie between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

INSIDE = tuple(str(Path(file).parent) + "/" for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """A RuntimeWarning at the innermost frame that is neither zokern's nor torch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


__all__ = ["warn"]
