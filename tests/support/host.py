"""csrc/*.cu as a Python module for the host: g++ compiles them through cuda_shim, each object once a session.

The workers of a session share the objects.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import sass
from mistakes import EVERY
from shared import FOLDER, once

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = (
    "bind.cpp",
    "axpy.cu",
    "elementwise.cu",
    "update.cu",
    "lowrank.cu",
    "project.cu",
)  # bind.cpp takes longest
NAME = "zokern_on_host"
FLAGS = (
    "-std=c++17 -O1 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
)
FLAGS += f" -DZOKERN_MODULE={NAME} -DZOKERN_LOWRANK_CUDA -DZOKERN_UPDATE"


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


def texts_of(source: str) -> dict[str, str]:
    """A file of csrc/ and the headers of that folder that it includes, by name."""
    return {
        path.name: path.read_text() for path in sorted(sass.included(CSRC / source)) if path.parent == CSRC
    }


def compiled(source: str) -> Path:
    """The object of a file of csrc/, with every mistake in it and in the headers that it includes there."""
    import pybind11

    texts = texts_of(source)
    for number, (right, wrong) in enumerate(EVERY, 1):
        wrong = wrong.replace("{wrong}", f"(shim_mistake == {number})")
        texts = {name: text.replace(right, wrong) for name, text in texts.items()}
    key = hashlib.sha256(repr((source, texts)).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        for name, text in texts.items():  # a header is looked for beside the file that includes it
            (folder / name).write_text(text)
        places = [
            folder,
            Path(__file__).parent / "cuda_shim",
            CSRC,
            pybind11.get_include(),
            sysconfig.get_path("include"),
        ]
        included = [f"-I{place}" for place in places]
        call("g++", *FLAGS.split(), *included, "-x", "c++", "-c", folder / source, "-o", folder / "object.o")

    return once(f"{Path(source).stem}-{key}", make) / "object.o"


@cache
def build() -> types.ModuleType:
    """The module. It makes the mistake that ZO_SHIM_MISTAKE numbers; unset: none."""
    texts = [text for source in SOURCES for text in texts_of(source).values()]
    for right, _ in EVERY:
        assert any(right in text for text in texts), f"no file of csrc/ has {right!r} any more"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    path = Path(mkdtemp(dir=FOLDER)) / f"{NAME}.so"
    call("g++", "-shared", *objects, "-o", path)
    # pybind11 answers with a module of this name that it already has: this one is in a package of its own
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{NAME}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose(monkeypatch: pytest.MonkeyPatch, part: Sequence[tuple[str, str, str]], name: str) -> None:
    """Has the module make the mistake of this name until the test ends."""
    chosen = next((right, wrong) for known, right, wrong in part if known == name)
    monkeypatch.setenv("ZO_SHIM_MISTAKE", str(1 + EVERY.index(chosen)))
