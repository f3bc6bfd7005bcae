"""Backends run the verbs. One that cannot run here says why, and no other takes its place."""

from __future__ import annotations

import importlib
from functools import cache

import torch

from ..warning import warn
from .base import DTYPES, ROUNDINGS, SCALARS, STATES, Backend, Multiplies
from .launch import (
    PROJECTED,
    Batch,
    Noise,
    Outer,
    Projected,
    Projection,
    Sides,
    Span,
    Terms,
    Thin,
    Update,
    Weight,
)
from .lists import SpanList, TensorList

BACKENDS = {"reference": "Reference", "cpu": "Cpu", "cuda": "Cuda", "triton": "Triton"}
DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # by device, best first


def why_off(name: str, device: torch.device | None = None) -> str | None:
    """Returns None if the backend can run here, else a sentence: why not, and the way out.

    device  asks about one GPU; None: about any"""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {sorted(BACKENDS)}")
    if name == "reference":
        return None
    module = importlib.import_module(f".{name}", __name__)
    return module.why_off() if device is None or device.type != "cuda" else module.why_off(device)


@cache
def get(name: str) -> Backend:
    """Returns the backend of this name. RuntimeError says why it is off, and which ones are on."""
    reason = why_off(name)
    if reason is not None:
        on = [other for other in BACKENDS if why_off(other) is None]
        raise RuntimeError(f"backend {name!r} is off: {reason} Usable here: {on}.")
    return getattr(importlib.import_module(f".{name}", __name__), BACKENDS[name])()


@cache
def default(device: torch.device) -> Backend:
    """Returns the best backend for a device, chosen once per process: the GPUs of a machine may differ."""
    names = DEFAULTS.get(device.type, ("reference",))
    reasons = {name: why_off(name, device) for name in names}
    best = next(name for name in names if reasons[name] is None)
    if best == "reference" and device.type in DEFAULTS:
        warn(
            f"zokern runs its reference backend on {device}, which is exact and slow: "
            + "; ".join(f"{name} is off: {reason}" for name, reason in reasons.items() if reason)
        )
    return get(best)


@cache
def _named(name: str, device: torch.device) -> Backend:
    """Returns the backend of this name. RuntimeError says why it is off on a device."""
    found, reason = get(name), why_off(name, device)
    if reason is not None and device.type == "cuda":
        raise RuntimeError(f"backend {name!r} is off on {device}: {reason}")
    return found


def resolve(backend: str | Backend | None, device: torch.device) -> Backend:
    """Returns a backend from its name, the default of the device for None, or the backend itself."""
    if backend is None:
        return default(device)
    if isinstance(backend, str):
        return _named(backend, device)
    if not hasattr(backend, "axpy_"):
        raise TypeError(f"backend is {backend!r}; expected None, one of {sorted(BACKENDS)} or a Backend")
    return backend


__all__ = [
    "BACKENDS", "DTYPES", "ROUNDINGS", "SCALARS", "STATES", "Backend", "Batch", "Multiplies", "Noise",
    "Outer", "PROJECTED", "Projected", "Projection", "Sides",
    "Span", "SpanList", "TensorList", "Terms", "Thin", "Update", "Weight", "default", "get", "resolve",
    "why_off",
]  # fmt: skip
