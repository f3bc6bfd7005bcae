"""project and the controls of axpy_, update_ and lowrank_ on backend 'cpu', and what their checks reject.

CUDA's kernels: tests/kernels_cuda/test_project_cuda.py.
Triton's: tests/kernels_triton/test_project_triton.py.
"""

from __future__ import annotations

import conformance_project
import pytest
from wrong.project import BACKENDS, Spelled

from zokern.backends.reference import Reference

PROJECT = [name for name in conformance_project.CHECKS if name.startswith("project_")]


@pytest.mark.parametrize("check", conformance_project.CHECKS)
def test_conformance(cpu, check: str) -> None:
    conformance_project.CHECKS[check](cpu, "cpu", "full")


@pytest.mark.parametrize("check", conformance_project.CHECKS)
def test_reference_passes(check: str) -> None:
    assert conformance_project.run(Reference(), only=[check]) == {check: None}


@pytest.mark.parametrize("check", PROJECT)
def test_reference_is_the_formulas(check: str) -> None:
    """A second spelling, number by number and without torch, has the same bits."""
    assert conformance_project.run(Spelled(), only=[check]) == {check: None}


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.__name__)
def test_wrong_backend_is_rejected(kind) -> None:
    """By each check that was written against the mistake, as quickly as an interpreter runs it."""
    verdicts = conformance_project.run(kind(), scale="quick", only=kind.rejected_by)
    for check, problem in verdicts.items():
        print(f"{kind.__name__}: {check}: {problem or 'NOT REJECTED'}")
    assert verdicts and all(verdicts.values())
    assert all("AssertionError" in problem for problem in verdicts.values() if problem)


@pytest.mark.parametrize("check", conformance_project.CHECKS)
def test_check_rejects_something(check: str) -> None:
    assert any(check in kind.rejected_by for kind in BACKENDS)
