"""The optimizer: what lasts between the steps of a run, behind torch's interface."""

from __future__ import annotations

from .zeroth_order import ZerothOrder

__all__ = ["ZerothOrder"]
