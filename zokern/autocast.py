"""Whether autocast is on, for every kind of device: some have none."""

from __future__ import annotations

import torch


def is_on(device_type: str) -> bool:
    """Returns whether autocast is on for a kind of device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


__all__ = ["is_on"]
