"""Whether autocast is on, for every kind of device: some have none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_on(device_type: str) -> bool:
    """Returns whether autocast is on for a kind of device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def off(device_type: str) -> AbstractContextManager:
    """Returns a context without autocast for a kind of device."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


__all__ = ["is_on", "off"]
