"""Parameters: groups, names, ids, ties and checks, which refuse a wrong one before a weight is touched."""

from .checks import check_parameter
from .groups import check_trained, named_groups
from .names import ids, is_wrapped, plain, plain_names
from .ties import Trained, check_overlap, check_tie, trained
from .wrappers import (
    check_flat,
    check_model,
    inner,
    is_compiled,
    is_parallel,
    is_spread,
    processes,
    spread_modules,
)

__all__ = [
    "Trained", "check_flat", "check_model", "check_overlap", "check_parameter", "check_tie", "check_trained",
    "ids", "inner", "is_compiled", "is_parallel", "is_spread", "is_wrapped", "named_groups", "plain",
    "plain_names", "processes", "spread_modules", "trained",
]  # fmt: skip
