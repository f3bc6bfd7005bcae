"""csrc/*.cu as a Python module for the host: g++ compiles them through tests/cuda_shim, each object once a session."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
import types
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bind.cpp", "elementwise.cu", "lowrank.cu")  # bind.cpp takes longest
NAME = "zokern_on_host"
FLAGS = "-std=c++17 -O1 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
FLAGS += f" -DZOKERN_MODULE={NAME} -DZOKERN_LOWRANK_CUDA"
FOLDER = TemporaryDirectory(prefix=f"{NAME}-")

Edits = tuple[tuple[str, str], ...]  # (text of a source, what stands in its place)


def missing() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    if shutil.which("g++") is None:
        return "g++ not found: install it"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 not found: pip install pybind11"
    return None


def call(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@cache
def compiled(source: str, edits: Edits) -> Path:
    """The object of a file of csrc/, with edits."""
    import pybind11

    text = (ROOT / "csrc" / source).read_text()
    for right, wrong in edits:
        assert right in text, f"{source} no longer has {right!r}"
        text = text.replace(right, wrong)
    path = Path(mkdtemp(dir=FOLDER.name)) / source
    path.write_text(text)
    folders = [ROOT / "tests" / "cuda_shim", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    call("g++", *FLAGS.split(), *(f"-I{folder}" for folder in folders), "-x", "c++", "-c", path, "-o", f"{path}.o")
    return Path(f"{path}.o")


@cache
def _built(edits: tuple[Edits, ...]) -> types.ModuleType:
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES, edits))
    path = Path(mkdtemp(dir=FOLDER.name)) / f"{NAME}.so"
    call("g++", "-shared", *objects, "-o", path)
    # pybind11 answers with the module that it already has of a name: each is in a package of its own
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{NAME}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(edits: Mapping[str, Edits] | None = None) -> types.ModuleType:
    """The module; `edits` of a source make a deliberately wrong one."""
    return _built(tuple((edits or {}).get(source, ()) for source in SOURCES))
