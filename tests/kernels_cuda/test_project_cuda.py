"""csrc/project.cu and the controls of the other verbs: on the host, bit for bit the reference; as PTX and as
machine code.

As test_update_cuda.py. On a GPU, `make gpu` runs the same checks.
"""

from __future__ import annotations

import re
import types

import conformance_project
import host
import pytest
import sass
from cuda_backends import OnHost, OnPtx

# One module is the kernels and holds every mistake: ZO_SHIM_MISTAKE chooses which one it makes, and unset
# makes none.
MISTAKES = [
    ("a sum for a mean", "p.reads == 1 ? total", "p.reads == 1 || {wrong} ? total"),
    ("a loss that is not read", "if (weight != 0.0) total", "if (weight != 0.0 || {wrong}) total"),
    ("a sum that begins with 0", "double total = -0.0;", "double total = {wrong} ? 0.0 : -0.0;"),
    ("the sign of nothing", "any ? total : 0.0", "any || {wrong} ? total : 0.0"),
    ("a NaN is cut", "return c != c ? c : clip;", "return c != c && !{wrong} ? c : clip;"),
    ("the bound is rounded", "return clip < low ? clip : low;",
        "return clip < low ? ({wrong} ? to_float(clip) : clip) : low;"),
    ("each lane for itself", "any |= seen[i];", "any |= seen[{wrong} ? lane : i];"),
    ("a lane's second draw", "int64_t k = lane; k < p.draws; k += lanes",
        "int64_t k = lane; k < p.draws; k += {wrong} ? p.draws : lanes"),
    ("a lane's second mean", "j < p.points; j += lanes", "j < p.points; j += {wrong} ? p.points : lanes"),
    ("weights of a stopped step", "weights[k] = 0.0, amounts",
        "weights[k] = {wrong} ? weights[k] : 0.0, amounts"),
    ("the decay of a stopped step", "finite ? to_float(decay) : 1.0f",
        "finite || {wrong} ? to_float(decay) : 1.0f"),
    ("the decay of the terms", "terms.last.decay = list.control[kDecay]",
        "terms.last.decay = {wrong} ? terms.last.decay : list.control[kDecay]"),
    ("the decay of the first term", "if (k == 0 && control != nullptr)",
        "if (k == 0 && control != nullptr && !{wrong})"),
    ("nothing stops", "list.control[by] == 0.0f", "list.control[by] == ({wrong} ? 2.0f : 0.0f)"),
    ("a rule stops where nothing moves", "stopped(list, kFinite)", "stopped(list, {wrong} ? kGo : kFinite)"),
    ("the decay of a product", "decay = control[0];", "decay = {wrong} ? 1.0f : control[0];"),
    ("a product goes on", "return control[1] == 0.0f ||", "return (control[1] == 0.0f && !{wrong}) ||"),
    ("two kernels at once", "(divided && is_simple", "(divided && !{wrong} && is_simple"),
    ("single elements of a product", "work.divided = false;", "work.divided = work.divided && {wrong};"),
    ("the clock of a product", "step += static_cast<uint32_t>(*clock)",
        "step += {wrong} ? 0u : static_cast<uint32_t>(*clock)"),
]  # fmt: skip


@pytest.fixture(scope="session")
def on_host() -> types.ModuleType:
    return host.mistaken(MISTAKES)


@pytest.mark.parametrize("check", conformance_project.CHECKS)
def test_host_is_the_reference(on_host, check: str) -> None:
    conformance_project.CHECKS[check](OnHost(on_host), "cpu", "full")


def test_order_changes_nothing(on_host, monkeypatch) -> None:
    """Lanes last to first."""
    monkeypatch.setenv("ZO_SHIM_ORDER", "1")
    for check in ("project_sizes", "project_control", "control_lowrank"):
        conformance_project.CHECKS[check](OnHost(on_host), "cpu", "quick")


@pytest.mark.parametrize("mistake", [name for name, *_ in MISTAKES])
def test_wrong_kernel_is_rejected(on_host, monkeypatch, mistake: str) -> None:
    monkeypatch.setenv("ZO_SHIM_MISTAKE", str(1 + [name for name, *_ in MISTAKES].index(mistake)))
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
    plain = r"(?:mul|add|sub|div)\.rn\.f64|neg\.f64|cvt\.rn\.f(?:64\.s64|32\.f64)|cvt\.f64\.f32"
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
