"""Imports point one way, raw addresses stay below the backends,
one idea keeps one stem, and tests stand after the rooms.

The sources are read, not run. Every rule is a function of the sources,
so that each is also given a tree that breaks it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A file imports from its own layer and from those above it in this list;
# within a layer, without going round in a circle.
LAYERS = {
    "kernels": [
        "warning",
        "stream",
        "checks",
        "autocast",
        "devices",
        "part",
        "triton_kernels",
        "_cpu",
        "_cuda",
    ],
    "directions": ["directions"],
    "backends": ["backends"],
    "operations": ["gemm", "ops"],
    "parts": [
        "shards",
        "fingerprint",
        "modules",
        "parameters",
        "group",
        "plan",
        "underflow",
        "evaluation",
        "estimator",
        "prospect",
        "device_numbers",
        "result",
        "guards",
        "transport",
        "parallel",
    ],
    "rules": ["rule"],
    "step": ["first_step", "first_order", "step"],
    "optimizer": ["optimizer"],
    "methods": ["methods", "objective", "tuning", "graph"],
    "applications": [
        "__init__",
        "training",
        "cli",
        "hf",
        "__main__",
        "_build",
    ],
}
RANK = {stem: rank for rank, stems in enumerate(LAYERS.values()) for stem in stems}
NATIVE = {"_cpu", "_cuda", "triton_kernels"}
# data_ptr() tells two tensors apart that share memory; these files compare addresses and hand none on.
COMPARES_ADDRESSES = {
    "zokern.ops.aliasing",
    "zokern.parameters.checks",
    "zokern.fingerprint",
    "zokern.modules",
    "zokern.evaluation.isolation",
}
# Folders of tests that no part of zokern has the name of. tests/ is on Python's path: a folder with the name
# of a package, as `triton`, would be imported where that package is missing.
OTHER_ROOMS = {"kernels_cuda", "kernels_triton", "bench", "parallel", "project"}


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    """The syntax tree of a source, node by node."""
    return list(ast.walk(ast.parse(source)))


def python_sources() -> dict[str, str]:
    """Module name to source, of everything that the wheel ships."""
    sources = {}
    for folder, package in (("zokern", "zokern"), ("triton_kernels", "zokern.triton_kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            sources[".".join(parts)] = path.read_text()
    return sources


def stem(module: str) -> str:
    """The name that LAYERS knows a module by: the part below `zokern`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(module: str, source: str, modules: set[str]) -> set[str]:
    """The zokern modules that a file imports, anywhere in it:
    at its top, in a function, for type checking only."""
    found: set[str] = set()
    package = module.split(".")[:-1]  # x.__init__ names its package's __init__ file
    known = modules | {m.removesuffix(".__init__") for m in modules} | {f"zokern.{name}" for name in RANK}
    for node in nodes(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "zokern"}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin.split(".")[0] == "zokern":
                # `from . import x` imports the module x where there is one, else a name of the package itself
                found |= {
                    full if (full := f"{origin}.{alias.name}") in known else origin for alias in node.names
                }
    return {f"{m}.__init__" if f"{m}.__init__" in modules else m for m in found}


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """What breaks the order of the layers, one sentence each."""
    errors, graph = [], {}
    for module, source in sources.items():
        if stem(module) not in RANK:
            errors.append(
                f"{module} is in no layer: add {stem(module)!r} to LAYERS in tests/project/test_layers.py"
            )
            continue
        graph[module] = imported(module, source, set(sources)) - {module}
        for target in sorted(graph[module]):
            if stem(target) not in RANK:
                continue  # reported as a file of its own
            if RANK[stem(target)] > RANK[stem(module)]:
                errors.append(f"{module} imports {target}, which stands above it")
            allowed = stem(module) in ("backends", "info") or stem(module) == stem(target)
            if stem(target) in NATIVE and not allowed:
                errors.append(f"{module} imports {target}: only backends/ calls kernels")
    return errors + [f"{' -> '.join(circle)} go round in a circle" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The circles of the import graph, by depth-first search.
    A package's __init__ gathers its files, and is no step in one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                if not target.endswith("__init__"):
                    visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def stray_addresses(sources: dict[str, str]) -> list[str]:
    """Uses of data_ptr outside backends/."""
    return [
        f"{module}:{node.lineno} takes a raw address"
        for module, source in sources.items()
        if stem(module) != "backends" and module not in COMPARES_ADDRESSES
        for node in nodes(source)
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    ]


def native_sources() -> dict[str, str]:
    return {
        str(p.relative_to(ROOT)): p.read_text()
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in (".h", ".cpp", ".cu")
    }


def wrong_includes(sources: dict[str, str]) -> list[str]:
    """What C++ files include against the rules: Python in bind.cpp alone, CUDA in .cu alone, torch nowhere,
    zo/ stands alone."""
    errors = []
    for path, source in sources.items():
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.M):
            if re.match(r"pybind11/|Python\.h", header) and path != "csrc/bind.cpp":
                errors.append(f"{path} includes {header}: only bind.cpp knows Python")
            if re.match(r"torch/|ATen/|c10/", header):
                errors.append(f"{path} includes {header}: no file under csrc knows torch")
            if re.match(r"cuda|cub/|cooperative_groups|nv", header) and not path.endswith(".cu"):
                errors.append(f"{path} includes {header}: only .cu files know the CUDA runtime")
            if path.startswith("csrc/zo/") and not (
                header in ("cstdint", "cstring") or f"csrc/zo/{header}" in sources
            ):
                errors.append(f"{path} includes {header}: csrc/zo includes <cstdint>, <cstring> and itself")
    return errors


def test_imports_point_one_way():
    sources = python_sources()
    assert len(sources) > 20
    assert wrong_imports(sources) == []


@pytest.mark.parametrize(
    "module, line, complaint",
    [
        ("zokern.backends.reference", "from ..step import step", "zokern.step, which stands above it"),
        ("zokern.directions.normal", "import zokern", "zokern.__init__, which stands above it"),
        (
            "zokern.ops.lowrank",
            "def f():\n    from ..optimizer import ZerothOrder",
            "zokern.optimizer.__init__, which stands above it",
        ),
        (
            "zokern.stream",
            "from zokern.directions import normal",
            "zokern.directions.normal, which stands above it",
        ),
        (
            "zokern.triton_kernels.normal",
            "from ..backends import pack",
            "zokern.backends.pack, which stands above it",
        ),
        ("zokern.plan", "from . import methods", "zokern.methods.__init__, which stands above it"),
        (
            "zokern.gemm.tiled",
            "from ..evaluation import master",
            "zokern.evaluation.master, which stands above it",
        ),
        ("zokern.backends.base", "from .. import gemm", "zokern.gemm.__init__, which stands above it"),
        ("zokern.rule.sgd", "from ..step import run", "zokern.step, which stands above it"),
        ("zokern.plan", "from .rule import Sgd", "zokern.rule.__init__, which stands above it"),
        (
            "zokern.evaluation.auto",
            "from ..first_step import unseen",
            "zokern.first_step, which stands above it",
        ),
        ("zokern.rule.sgd", "from ..graph import Graph", "zokern.graph, which stands above it"),
        ("zokern.fingerprint", "from .graph import Graph", "zokern.graph, which stands above it"),
        ("zokern.methods.pgap", "from .. import _cpu", "only backends/ calls kernels"),
        ("zokern.step", "from . import _cpu", "only backends/ calls kernels"),
        ("zokern.evaluation.inplace", "from ..triton_kernels import normal", "only backends/ calls kernels"),
        ("zokern.plan", "from .evaluation import master", "go round in a circle"),
        ("zokern.surprise", "", "zokern.surprise is in no layer"),
    ],
)
def test_a_wrong_import_is_rejected(module, line, complaint):
    sources = python_sources()
    sources[module] = sources.get(module, "") + "\n" + line + "\n"
    assert any(complaint in error for error in wrong_imports(sources))


def test_addresses_stay_in_the_backends():
    assert stray_addresses(python_sources()) == []


def test_a_stray_address_is_rejected():
    sources = {**python_sources(), "zokern.evaluation.wrong": "def f(t):\n    return t.data_ptr()\n"}
    assert stray_addresses(sources) == ["zokern.evaluation.wrong:2 takes a raw address"]


def test_includes():
    sources = native_sources()
    assert "csrc/bind.cpp" in sources
    assert wrong_includes(sources) == []


@pytest.mark.parametrize(
    "path, line",
    [
        ("csrc/elementwise.cpp", "#include <pybind11/pybind11.h>"),
        ("csrc/elementwise.h", "#include <Python.h>"),
        ("csrc/elementwise.cu", "#include <ATen/cuda/CUDAContext.h>"),
        ("csrc/bind.cpp", "#include <torch/extension.h>"),
        ("csrc/bind.cpp", "# include <cuda_runtime.h>"),
        ("csrc/zo/philox.h", "#include <cmath>"),
        ("csrc/zo/philox.h", '#include "../elementwise.h"'),
    ],
)
def test_a_wrong_include_is_rejected(path, line):
    sources = native_sources()
    sources[path] += f"\n{line}\n"
    assert len(wrong_includes(sources)) >= 1


def elementwise(sources: dict[str, str]) -> set[str]:
    """Stems of the directions that map words to values one by one: the others are made of these, and have no
    kernel of their own."""
    files = {
        m.rsplit(".", 1)[1]: source for m, source in sources.items() if m.startswith("zokern.directions.")
    }
    return {
        name
        for name, source in files.items()
        if name != "__init__" and re.search(r"^    per_block\b", source, re.M)
    }


def test_one_idea_keeps_one_stem():
    """A direction has the same name in PyTorch, in C++ and in Triton."""
    stems = elementwise(python_sources())
    assert stems == {"normal", "rademacher"}
    assert stems <= {path.stem for path in (ROOT / "csrc" / "zo").glob("*.h")}
    assert stems <= {path.stem for path in (ROOT / "triton_kernels").glob("*.py")}


def sources_of_tests() -> dict[str, str]:
    """Path below tests/ to source; what writes the frozen vectors is no test."""
    found = {
        path.relative_to(ROOT / "tests").as_posix(): path.read_text()
        for path in (ROOT / "tests").rglob("*.py")
    }
    return {name: source for name, source in found.items() if not name.startswith("vectors/")}


def misplaced(sources: dict[str, str]) -> list[str]:
    """What breaks the order of the tests, one sentence each: their places, their names, their imports."""
    errors, files = [], {name: PurePosixPath(name) for name in sources if name != "conftest.py"}
    for name, file in files.items():
        is_test, room = file.name.startswith("test_"), file.parts[0]
        if room == "support":
            if is_test:
                errors.append(f"{name} is a test: move it to the folder of what it tests")
        elif not is_test:
            errors.append(f"{name} is no test: move it to support/")
        elif len(file.parts) != 2 or room not in OTHER_ROOMS | RANK.keys():
            errors.append(
                f"{name} is in no room: move it to a folder named after a part of zokern, or one of "
                f"{sorted(OTHER_ROOMS)}"
            )
    for name, source in sources.items():
        modules = [m for node in nodes(source) for m in _named(node) if re.fullmatch(r"(.*\.)?test_\w+", m)]
        errors += [f"{name} imports {module}: move what they share to support/" for module in modules]
    names = Counter(file.name for file in files.values())
    return errors + [
        f"{count} files are called {name}"
        for name, count in names.items()
        if name.startswith("test_") and count > 1
    ]


def _named(node: ast.AST) -> list[str]:
    """The modules that an import may name: in `from a import b`, a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [*filter(None, [node.module]), *(f"{node.module or ''}.{alias.name}" for alias in node.names)]
    return []


def test_tests_stand_after_the_rooms():
    sources = sources_of_tests()
    assert len(sources) > 80 and "support/recipes.py" in sources
    assert misplaced(sources) == []


@pytest.mark.parametrize(
    "name, source, complaint",
    [
        ("step/test_more.py", "import test_step", "step/test_more.py imports test_step: "),
        (
            "step/test_more.py",
            "def f():\n    from test_step import loss_of",
            "step/test_more.py imports test_step: ",
        ),
        ("step/test_more.py", "from . import test_step", "step/test_more.py imports .test_step: "),
        ("support/more.py", "import models, test_step", "support/more.py imports test_step: "),
        ("conftest.py", "from test_step import loss_of", "conftest.py imports test_step: "),
        ("more.py", "", "more.py is no test: move it to support/"),
        ("step/more.py", "", "step/more.py is no test: move it to support/"),
        ("step/conftest.py", "", "step/conftest.py is no test: move it to support/"),
        ("support/test_more.py", "", "support/test_more.py is a test"),
        ("test_more.py", "", "test_more.py is in no room"),
        ("triton/test_more.py", "", "triton/test_more.py is in no room"),
        ("step/deep/test_more.py", "", "step/deep/test_more.py is in no room"),
        ("evaluation/test_step.py", "", "2 files are called test_step.py"),
    ],
)
def test_a_misplaced_test_is_rejected(name, source, complaint):
    errors = misplaced({**sources_of_tests(), name: source})
    assert len(errors) == 1 and errors[0].startswith(complaint)
