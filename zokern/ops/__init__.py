"""The public verbs. Each checks its arguments, calls a backend, and is an operation of torch.library.

A step calls the backends itself, with lists that it has checked; these functions are the same verbs for
tools, tests and other loops.
"""

from .elementwise import axpy_, draw, perturb
from .lowrank import lowrank_
from .philox import philox4x32
from .project import project
from .update import update_

# `linear` and `sketch` come from zokern.ops.linear: imported here, the function would hide its module.
__all__ = ["axpy_", "draw", "lowrank_", "perturb", "philox4x32", "project", "update_"]
