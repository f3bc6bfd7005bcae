"""csrc/project.cu and the controls of the other verbs: on the host, bit for bit the reference; as PTX and as
machine code.

As test_update_cuda.py. On a GPU, `make gpu` runs the same checks.
"""

from __future__ import annotations

import re

import conformance_project
import host
import pytest
import sass
from cuda_backends import OnHost, OnPtx
from mistakes import PROJECT


@pytest.mark.parametrize("check", conformance_project.CHECKS)
def test_host_is_the_reference(on_host, check: str) -> None:
    conformance_project.CHECKS[check](OnHost(on_host), "cpu", "full")


def test_order_changes_nothing(on_host, monkeypatch) -> None:
    """Lanes last to first."""
    monkeypatch.setenv("ZO_SHIM_ORDER", "1")
    for check in ("project_sizes", "project_control", "control_lowrank"):
        conformance_project.CHECKS[check](OnHost(on_host), "cpu", "quick")


@pytest.mark.parametrize("mistake", [name for name, *_ in PROJECT])
def test_wrong_kernel_is_rejected(on_host, monkeypatch, mistake: str) -> None:
    host.choose(monkeypatch, PROJECT, mistake)
    for check in conformance_project.CHECKS:  # until one rejects it
        scale = "full" if check == "project_sizes" else "quick"
        problem = conformance_project.run(OnHost(on_host), "cpu", scale, [check])[check]
        if problem:
            print(f"{mistake}: {check}: {problem}")
            assert "AssertionError" in problem
            return
    raise AssertionError(f"no check rejects {mistake!r}")


# PTX and machine code ---------------------------------------------------------------------------------------

SOURCE = sass.CSRC / "project.cu"
compiled = pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")


def inexact(text: str) -> set[str]:
    """Operations on numbers in PTX that are no sum, product or quotient rounded once, to nearest."""
    used = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*\.f(?:16|32|64)(?:\.\w+)*)\s", text, re.MULTILINE))
    plain = r"(?:mul|add|sub|div)\.rn\.f64|neg\.f64|abs\.f32|cvt\.rn\.f(?:64\.s64|32\.f64)|cvt\.f64\.f32"
    moved = r"(?:mov|selp|setp\.\w+|ld\.\S+?|st\.\S+?)\.f(?:32|64)"
    return {name for name in used if not re.fullmatch(f"{plain}|{moved}", name)}


@compiled
def test_ptx_is_not_contracted(tmp_path) -> None:
    """Every operation is one of the contract's. A kernel whose products a compiler may contract is found."""
    text = sass.device_text((SOURCE,), "projects")
    assert text.count("div.rn.f64") >= 3 and not inexact(text)
    header = (sass.CSRC / "projector.h").read_text()
    assert "return __dmul_rn(a, b);" in header and "return __dadd_rn(a, b);" in header
    header = header.replace("__dmul_rn(a, b)", "a * b").replace("__dadd_rn(a, b)", "a + b")
    (tmp_path / "projector.h").write_text(header)
    (tmp_path / "project.cu").write_text(SOURCE.read_text())
    wrong = sass.compile_to(
        tmp_path / "wrong.ptx", "90", "-fmad=true", kind="ptx", source=tmp_path / "project.cu"
    )
    assert "fma.rn.f64" in inexact(wrong.read_text())


@compiled
def test_machine_code() -> None:
    """One kernel, no spill, no indexed register, and no product and sum in one but inside the quotients."""
    for arch, functions in sass.machine_code((SOURCE,), "projects").items():
        (function,) = functions.values()
        assert not function.spilled() and function.registers <= 128
        assert "local memory (a spill or an indexed register)" not in function.forbidden()
        names = sass.histogram(function.code)
        print(f"sm_{arch}: {function.registers} registers, {len(function.code)} instructions")
        assert sum(names[name] for name in names if name.startswith("MUFU.RCP64H")) >= 1


@compiled
@pytest.mark.parametrize("check", ["control_axpy", "control_update"])
def test_ptx_reads_the_control(check: str) -> None:
    updates = ((sass.CSRC / "update.cu",), "updates")
    text = sass.device_text(*(updates if check == "control_update" else ()))
    conformance_project.CHECKS[check](OnPtx(text), "cpu", "quick")
