"""The verbs of csrc/elementwise.h, update.h, lowrank.h, linear.h and project.h as Triton kernels;
zokern/backends/triton.py launches them. What they share has the stems of csrc and csrc/zo."""

from . import elementwise, linear, lowrank, project, update

__all__ = ["elementwise", "linear", "lowrank", "project", "update"]
