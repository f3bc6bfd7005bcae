"""The compiled module of backend ``cpu``, and the instruction set that it runs.

The environment variable ``ZOKERN_CPU_ISA`` (avx512bf16, avx512, avx2 or scalar) forces one of the paths that
this machine can run; all give the same bits.
"""

from __future__ import annotations

from operator import is_
from typing import Any

# torch comes before _cpu: both then share one OpenMP runtime, and torch's threads are not oversubscribed
import torch  # noqa: F401

_cpu: Any = None
_error = ""
try:
    from .. import _cpu  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    _error = str(error)


def why_off() -> str | None:
    """Returns None if this backend can run here, else why not, and the way out."""
    if _cpu is not None:
        return None
    if "libgomp" in _error:  # older builds of torch bring it under a name of their own
        return (
            f"the compiled module zokern._cpu cannot be loaded ({_error}); install the system's OpenMP "
            "library (Debian: apt-get install libgomp1), or torch 2.13, which brings it"
        )
    return (
        f"the compiled module zokern._cpu is missing ({_error}); install a wheel that has it, or g++ and run "
        "`pip install --no-build-isolation .`; backend 'reference' needs neither"
    )


def same_values(dicts: list[dict], kept: list) -> bool:
    """Tells whether the values of some dicts, one dict after another, are the very objects of a list."""
    if _cpu is not None:
        return bool(_cpu.same_values(dicts, kept))
    now = [value for held in dicts for value in held.values()]
    return len(now) == len(kept) and all(map(is_, now, kept))


def isa() -> str:
    """Returns the instruction set in use: 'avx512bf16', 'avx512', 'avx2' or 'scalar'."""
    return str(module().implementation())


def pairs() -> bool:
    """Tells whether linear() multiplies bfloat16 by the processor's dot product of pairs."""
    return bool(module().linear_pairs())


def select(name: str) -> None:
    """Selects another of `architectures()`. ValueError if it cannot run here."""
    module().select(name)


def architectures() -> list[str]:
    """Returns the instruction sets that this machine can run, best first."""
    return list(module().architectures())


def module() -> Any:
    if _cpu is None:
        raise RuntimeError(f"backend 'cpu' is off: {why_off()}")
    return _cpu


__all__ = ["architectures", "isa", "module", "pairs", "same_values", "select", "why_off"]
