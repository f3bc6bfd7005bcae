"""Triton kernels of this tree or with one line changed:
compiled without a device, and read as PTX and as machine code.

An import skips the test file where Triton, or the backend, is missing.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import sass

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from zokern.backends import triton as backend  # noqa: E402

if not hasattr(backend, "elementwise"):
    pytest.skip(f"backend 'triton' is off: {backend.why_off()}", allow_module_level=True)

TYPES = {
    "entries": "*i64", "chunks": "*i64", "draws": "*i64", "coefficients": "*fp32", "nonfinite": "*i64",
    "draw_count": "i32",
    "counters": "*i64", "words": "*i64", "count": "i64", "decay": "fp32", "scale0": "fp32", "scale1": "fp32",
    "each": "i32", "step": "i32", "draw": "i32", "keys": ("i32",) * 20, "clock": "*i64", "scalars": "*fp32",
    "control": "*fp32",
}  # fmt: skip


def load(directory: Path, name: str) -> ModuleType:
    """A copy of triton_kernels, imported under a name of its own; its module `elementwise`."""
    spec = importlib.util.spec_from_file_location(
        name, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].elementwise


def changed(directory: Path, file: str, old: str, new: str) -> ModuleType:
    """triton_kernels with one line replaced wherever it stands."""
    shutil.copytree(
        Path(backend.triton_kernels.__file__).parent, directory, ignore=shutil.ignore_patterns("__pycache__")
    )
    text = (directory / f"{file}.py").read_text()
    assert old in text, f"{file}.py has no {old!r}"
    (directory / f"{file}.py").write_text(text.replace(old, new))
    return load(directory, directory.name)


@cache
def interpreter_rounds_twice() -> bool:
    """Before 3.7 the interpreter's tl.fma multiplies and adds."""
    return tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)


needs_fma = pytest.mark.skipif(
    interpreter_rounds_twice(), reason="the interpreter of triton before 3.7 rounds tl.fma twice"
)


def made(
    kernel, arch: str, constants: dict, fusion: bool = False, warps: int = backend.WARPS, types: dict = TYPES
):
    """One kernel, compiled for an architecture as the backend would have it."""
    signature = {
        argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names
    }
    source = triton.compiler.ASTSource(kernel, signature, constants)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Iterator[Path]:
    """Where kernels are compiled to; Triton's cache is there too."""
    if backend.interpreted():
        pytest.skip("TRITON_INTERPRET=1 is set, so there are no kernels to compile")
    directory = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(directory / "cache"))
        yield directory


def unspecified(text: str) -> set[str]:
    """Floating-point instructions of a kernel's PTX that the stream does not name:
    only .rn, no .ftz, nothing approximate."""
    used = set(
        re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*\.f(?:16|32|64)(?:x2)?(?:\.\w+)*)\s", text, re.MULTILINE)
    )
    plain = (
        r"(?:fma|mul|add|sub)\.rn\.f32(?:x2)?|cvt\.rn\.b?f16x2\.f32|cvt\.f32\.f16|fma\.rn\.f16x2|neg\.f32"
        r"|cvt\.rn\.f32\.[su](?:16|32)"
        r"|setp\.(?:nan|neu|num|ne)\.f32|mov\.f32|selp\.f32|(?:ld|st)\..*"
    )
    return {name for name in used if not re.fullmatch(plain, name)}


def forbidden(function: sass.Function) -> dict[str, list[str]]:
    """What sass.py forbids. ptxas for sm_80 leaves a loop by
    a CALL to a label of the same kernel, which is a jump."""
    found = {
        why: [t for t in texts if not re.search(r"CALL\.REL\.NOINC `\(\.L_x_", t)]
        for why, texts in function.forbidden().items()
    }
    return {why: texts for why, texts in found.items() if texts}
