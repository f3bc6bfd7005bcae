"""The verbs of csrc/elementwise.h, update.h, lowrank.h and project.h as Triton kernels, which
zokern/backends/triton.py launches. Same stems as csrc/zo."""

from . import elementwise, lowrank, normal, philox, portable, project, rademacher, rounding, update

__all__ = [
    "elementwise",
    "lowrank",
    "normal",
    "philox",
    "portable",
    "project",
    "rademacher",
    "rounding",
    "update",
]
