"""triton_kernels/project.py, and the controls of the other verbs, without a GPU: interpreted and compared bit
for bit, compiled and read.

As test_update_triton.py. Wrong kernels are copies with one line changed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import conformance_project
import pytest
import sass
import torch
from interpreted import Interpreted

pytest.importorskip("triton")
from compiled import changed, made, needs_fma  # noqa: E402
from compiled import directory as directory  # noqa: E402

from zokern.backends import triton as backend  # noqa: E402

WRONG = {  # name: (file, text, replacement, the check that rejects it)
    "a sum for a mean": ("project", "total / (tl.zeros([], tl.float64) + m)", "total", "project_sizes"),
    "a loss that is not read": ("project", "tl.where(weight != 0.0, total + term, total)", "total + term",
        "project_zeros"),
    "a sum that begins with 0": ("project", "SIGN_BIT, tl.int64)", "0, tl.int64)", "project_zeros"),
    "the sign of nothing": ("project", "tl.where(found != 0, total, 0.0)", "total", "project_zeros"),
    "single sums": ("project", "term = weight * mean", "term = weight.to(tl.float32) * mean",
        "project_order"),
    "a NaN is cut": ("project", "return tl.where(c != c, c, cut)", "return tl.where(c != c, clip, cut)",
        "project_clip"),
    "not rounded before the cut": ("project", "(total / tl.load(scalars)).to(tl.float32)",
        "(total / tl.load(scalars))", "project_sizes"),
    "amounts unwatched": ("project", "is_broken(c) | is_broken(told) | is_broken(moved)", "is_broken(c)",
        "project_control"),
    "weights of a stopped step": ("project", "draws + k, tl.zeros", "2 * draws + k, tl.zeros",
        "project_control"),
    "the decay of a stopped step": ("project", "tl.where(finite, decay.to(tl.float32), 1.0)",
        "decay.to(tl.float32)", "project_control"),
    "the decay of a product": ("lowrank", "        decay = tl.load(control)\n", "", "control_lowrank"),
    "a product goes on": ("lowrank", "unless_stopped(rows, control, GO)", "rows", "control_lowrank"),
    "single elements go on": ("lowrank", "tl.where(tl.load(control + GO) != 0.0, end, begin)", "end",
        "control_lowrank"),
    "the clock of a product": ("lowrank", "step = name_of(step, clock)", "step = name_of(step, None)",
        "lowrank_clock"),
    "the decay of the terms": ("elementwise", "        decay = tl.load(control)\n", "", "control_axpy"),
    "weights go on": ("elements", "tl.where(tl.load(control + BY) != 0.0, count, 0)", "count",
        "control_axpy"),
    "a rule stops where nothing moves": ("update", "control, FINITE)", "control, FINITE - 1)",
        "control_update"),
}  # fmt: skip


def verdicts(folder: Path) -> dict[str, str | None]:
    """In the child: every check's verdict on the kernels, and on each wrong one the verdict of its check."""
    torch.set_num_threads(1)
    found = conformance_project.run(backend.Triton(), "cpu", "quick")
    modules = ("elementwise", "lowrank", "project", "update")
    right = {name: getattr(backend, name) for name in modules}
    for name, (*change, check) in WRONG.items():
        package = changed(folder / re.sub(r"\W", "_", name), *change).__name__.rpartition(".")[0]
        for module in modules:
            setattr(backend, module, sys.modules[f"{package}.{module}"])
        found |= {name: conformance_project.run(backend.Triton(), "cpu", "quick", [check])[check]}
        for module in modules:
            setattr(backend, module, right[module])
    return found


CHILD = Interpreted(__file__)


@needs_fma
@pytest.mark.parametrize("check", conformance_project.CHECKS)
def test_interpreted(interpreted, check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


@needs_fma
@pytest.mark.parametrize("name", WRONG)
def test_interpreted_rejects(interpreted, name: str) -> None:
    print(interpreted[name])
    assert interpreted[name] is not None and "AssertionError" in interpreted[name]


# --- compiled -----------------------------------------------------------------------------------------------

TYPES = {
    "losses": "*fp64", "weights": "*fp64", "scalars": "*fp64", "wide": "*fp64", "single": "*fp32", "m": "i32",
    "n": "i32", "draws": "i32",
}  # fmt: skip
needs_sass = pytest.mark.skipif(
    sass.tool("nvdisasm") is None, reason="nvdisasm not found: install triton or the CUDA binary utilities"
)


def machine(folder: Path, arch: str, constants: dict, fusion: bool = False) -> tuple[str, sass.Function]:
    constants = {"BLOCK": 32} | constants
    asm = made(backend.project.project, arch, constants, fusion, warps=1, types=TYPES).asm
    (folder / "project.cubin").write_bytes(asm["cubin"])
    return asm["ptx"], next(iter(sass.disassemble(folder / "project.cubin").values()))


def contracted(text: str) -> list[str]:
    """Instructions of the PTX that compute a product and a sum in one, or to another precision."""
    return re.findall(r"\b(?:fma|mad)\.\S*f\d+|\S+\.approx\S*|\S+\.ftz\S*|\bdiv\.full\S*", text)


@needs_sass
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_compiled(directory, tmp_path, arch: str) -> None:
    """No spill, no contraction, quotients that are rounded once; of one read there is no mean."""
    for constants, quotients in (({"m": 1}, 2), ({}, 3), ({"weights": None}, 2)):
        text, function = machine(tmp_path, arch, constants)
        assert not function.spilled() and not contracted(text)
        assert text.count("div.rn.f64") == quotients
        print(f"sm_{arch} {constants}: {function.registers} registers, {len(function.code)} instructions")


@needs_sass
def test_compiled_rejects_contraction(directory, tmp_path) -> None:
    text, _ = machine(tmp_path, "90", {}, fusion=True)
    assert contracted(text)


@needs_sass
@pytest.mark.parametrize("verb", ["axpy", "update"])
def test_a_control_costs_no_register_of_the_loop(directory, tmp_path, verb: str) -> None:
    """With a control the kernels have no spill, and the loops that they have without one."""
    constants = dict(DIRECTION=0, ROUNDING=0, KINDS=2, draw_count=1, draws=None, clock=None, SCALED=False,
                     BLOCK=backend.BLOCK["normal"], TAIL=backend.TAIL, SPLIT=backend.SPLIT)  # fmt: skip
    constants |= {"axpy": dict(each=1, DECAY=True, EACH=False), "update": dict(RULE=0)}[verb]
    loads = {"axpy": 2, "update": 6}[verb]
    lengths = []
    for control in ({"control": None}, {}):
        asm = made(getattr(getattr(backend, {"axpy": "elementwise"}.get(verb, verb)), verb), "90",
                   constants | control).asm  # fmt: skip
        (tmp_path / "x.cubin").write_bytes(asm["cubin"])
        function = next(iter(sass.disassemble(tmp_path / "x.cubin").values()))
        assert not function.spilled() and not function.forbidden()
        lengths.append(len(sass.vector_loop(function, loads, loads)))
    print(f"{verb}: {lengths[0]} instructions in a turn without a control, {lengths[1]} with one")
    assert lengths[1] <= lengths[0] + 2


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "verdicts.json").write_text(json.dumps(verdicts(folder)))


if __name__ == "__main__":
    main()
