"""Seeds named after the test, and reasons for skips in the report."""

from __future__ import annotations

import zlib

import pytest
import torch


def pytest_configure(config) -> None:
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # a test that cannot run here says why


@pytest.fixture(autouse=True)
def _seeded(request) -> None:
    """torch's global stream starts from the test's name."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def grad_mode():
    """A deliberately wrong version may leave its grad mode on the thread; the next test starts from this one's."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)
