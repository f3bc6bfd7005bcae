"""The verbs of csrc/elementwise.h, update.h, lowrank.h, linear.h and project.h as Triton kernels;
zokern/backends/triton.py launches them. Same stems as csrc/zo."""

from . import elementwise, linear, lowrank, normal, philox, portable, project, rademacher, rounding, update

__all__ = [
    "elementwise",
    "linear",
    "lowrank",
    "normal",
    "philox",
    "portable",
    "project",
    "rademacher",
    "rounding",
    "update",
]
