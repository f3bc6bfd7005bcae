"""Every deliberately wrong backend of tests/support/wrong/ is rejected, and the reference is not.

`PYTHONPATH=tests/support python tests/backends/test_wrong.py` runs the whole suite over each and prints which
checks reject it.
"""

from __future__ import annotations

import conformance
import pytest
from wrong import BACKENDS

from zokern.backends.reference import Reference


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.__name__)
def test_wrong_backend_is_rejected(kind) -> None:
    """By each check that was written against the mistake."""
    assert kind.rejected_by, f"{kind.__name__} names no check"
    verdicts = conformance.run(kind(), scale="quick", only=kind.rejected_by)
    for check, problem in verdicts.items():
        print(f"{kind.__name__}: {check}: {problem or 'NOT REJECTED'}")
    assert all(verdicts.values()), (
        f"not rejected by {[check for check, problem in verdicts.items() if problem is None]}"
    )


@pytest.mark.parametrize("check", conformance.EVERY)
def test_reference_passes(check: str) -> None:
    """Otherwise the rejections above would mean nothing."""
    assert conformance.run(Reference(), scale="quick", only=[check]) == {check: None}


@pytest.mark.parametrize("check", conformance.EVERY)
def test_check_rejects_something(check: str) -> None:
    """A check that no wrong backend names has not been shown to be able to fail."""
    assert any(check in kind.rejected_by for kind in BACKENDS), (
        f"no backend of tests/support/wrong/ is aimed at {check}"
    )


def main() -> None:
    for kind in BACKENDS:
        verdicts = conformance.run(kind(), scale="quick")
        print(
            f"{kind.__name__:28} "
            f"{' '.join(name for name, problem in verdicts.items() if problem) or 'NOT REJECTED'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
