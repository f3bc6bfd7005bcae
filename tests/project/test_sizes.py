"""The largest files, functions and constructors.

Sources are read, not run. A file has all its lines. A function has its lines of code: docstrings, comments
and blank lines do not count, because a public docstring is the manual of its function. Kernels have limits
of their own, no higher than the longest of today: a kernel is one function of the GPU, or one loop of a CPU.
Every count is also given a source over its limit.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

from zokern import methods

ROOT = Path(__file__).resolve().parents[2]
FILE = {"zokern": 400, "triton_kernels": 400, "csrc": 500}  # lines
FUNCTION = {"zokern": 50, "triton_kernels": 96, "csrc": 77}  # lines of code
ARGUMENTS = 12  # that a constructor names
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
}  # fmt: skip
TYPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sources() -> dict[str, str]:
    """Path to source, of everything with a limit."""
    found = [path for folder in FILE for path in (ROOT / folder).rglob("*")]
    kinds = {".py", ".h", ".cpp", ".cu", ".def"}
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in found if p.suffix in kinds}


def large_files(sources: dict[str, str]) -> list[str]:
    """Files over their limit, one sentence each."""
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    limits = {path: FILE[path.split("/")[0]] for path in sources}
    return [f"{p} has {n} lines; at most {limits[p]}" for p, n in lines.items() if n > limits[p]]


def python_functions(source: str) -> dict[str, int]:
    """Returns the lines of code of every function, by name and first line."""
    tree, code = ast.parse(source), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, TYPES) and ast.get_docstring(node, clean=False) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return {
        f"{node.name}:{node.lineno}": len(code & set(range(node.lineno, node.end_lineno + 1)))
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def native_functions(source: str) -> dict[str, int]:
    """Returns the lines of code of every C++ or CUDA function, by its first line. Lambdas are part of it."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", "", source, flags=re.S)
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", "", code, flags=re.M)
    found, depth, inside, header = {}, 0, None, 0  # inside: (depth, place) of the function that is open
    for match in re.finditer(r"[{};]", code):
        place = match.start()
        if match.group() == "{":
            words = code[header:place]
            scope = re.search(r"\b(namespace|struct|class|enum|union|extern)\b(?![^<]*>)", words)
            if inside is None and "(" in words and not scope:
                inside = depth, header + len(words) - len(words.lstrip())
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if inside is not None and inside[0] == depth:
                body = code[inside[1] : place + 1]
                name = f"{code.count(chr(10), 0, inside[1]) + 1}"
                found[name] = sum(1 for line in body.splitlines() if line.strip())
                inside = None
        header = place + 1
    return found


def large_functions(sources: dict[str, str]) -> list[str]:
    """Functions over the limit, one sentence each."""
    errors = []
    for path, source in sources.items():
        limit = FUNCTION[path.split("/")[0]]
        counts = (python_functions if path.endswith(".py") else native_functions)(source)
        errors += [
            f"{path}:{f} has {n} lines of code; at most {limit}" for f, n in counts.items() if n > limit
        ]
    return errors


def long_constructors(classes: list[type]) -> list[str]:
    """Constructors of methods with too many named arguments, one sentence each."""
    named = {cls: list(inspect.signature(cls).parameters.values()) for cls in classes}
    counts = {cls: sum(p.kind is not p.VAR_KEYWORD for p in given) for cls, given in named.items()}
    return [
        f"{c.__name__} has {n} arguments; at most {ARGUMENTS}" for c, n in counts.items() if n > ARGUMENTS
    ]


def test_files() -> None:
    found = sources()
    assert {"zokern/step.py", "triton_kernels/update.py", "csrc/axpy.cu", "csrc/zo/normal.h"} <= found.keys()
    assert large_files(found) == []


@pytest.mark.parametrize("folder, limit", FILE.items())
def test_a_large_file_is_rejected(folder: str, limit: int) -> None:
    path = f"{folder}/more.py"
    assert large_files({path: "x\n" * limit}) == []
    assert large_files({path: "x\n" * (limit + 1)}) == [f"{path} has {limit + 1} lines; at most {limit}"]


def test_functions() -> None:
    found = sources()
    assert large_functions(found) == []
    counted = {path: len(native_functions(s)) for path, s in found.items() if not path.endswith(".py")}
    assert (
        counted["csrc/walk.h"] == found["csrc/walk.h"].count("__forceinline__") + 2
    )  # start() and unknown()


SHELLS = {  # what stands around the lines of a function, and how many lines of code it has itself
    "a function": ("def f():\n", "    x = 1\n", "", 1),
    "a docstring does not count": ('def f():\n    """One.\n\n    Two."""\n', "    x = 1\n", "", 1),
    "comments do not count": ("def f():\n    # why\n\n", "    x = 1\n", "", 1),
    "a method": ("class A:\n    async def f(self):\n", "        x = 1\n", "", 1),
    "a function inside": ("def f():\n    def g():\n        pass\n", "    x = 1\n", "", 3),
    "a string is code": ("def f():\n    x = '''\n", "    one\n", "    '''\n", 3),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_large_function_is_rejected(shell: str) -> None:
    before, line, after, own = SHELLS[shell]
    most = FUNCTION["zokern"] - own
    assert large_functions({"zokern/more.py": before + line * most + after}) == []
    (error,) = large_functions({"zokern/more.py": before + line * (most + 1) + after})
    assert error.startswith("zokern/more.py:f:") and error.endswith("has 51 lines of code; at most 50")


NATIVE_SHELLS = {
    "a function": ("int f(int x) {\n", "  x += 1;\n", "}\n", 2),
    "comments do not count": ("// {\n/* {\n */\nint f(int x) {\n  // why {\n\n", "  x += 1;\n", "}\n", 2),
    "in a namespace and a struct": (
        "namespace zo {\nstruct A {\n  int f(int x) const {\n", "    x += 1;\n", "  }\n};\n}\n", 2),
    "a template": ("template <class T>\nT f(T x) {\n", "  x += 1;\n", "}\n", 3),
    "a loop": ("void f(int x) {\n  for (;;) {\n", "    x += 1;\n", "  }\n}\n", 4),
    "a lambda": ("void f(int x) {\n  const auto g = [&](int y) {\n", "    x += y;\n", "  };\n}\n", 4),
    "a constructor": ("struct A {\n  A(int y) : x(y) {\n", "    x += 1;\n", "  }\n  int x;\n};\n", 2),
    "a macro is no function": ("#define F(x) \\\n  {\nint f(int x) {\n", "  x += 1;\n", "}\n", 2),
}  # fmt: skip


@pytest.mark.parametrize("shell", NATIVE_SHELLS)
def test_a_large_native_function_is_rejected(shell: str) -> None:
    before, line, after, own = NATIVE_SHELLS[shell]
    most = FUNCTION["csrc"] - own
    assert large_functions({"csrc/more.h": before + line * most + after}) == []
    (error,) = large_functions({"csrc/more.h": before + line * (most + 1) + after})
    assert error.endswith(f"has {FUNCTION['csrc'] + 1} lines of code; at most {FUNCTION['csrc']}")


def test_a_long_struct_is_no_function() -> None:
    assert large_functions({"csrc/more.h": "struct A {\n" + "  int x;\n" * 100 + "};\n"}) == []


def test_constructors() -> None:
    assert len(methods.METHODS) > 25 and long_constructors(list(methods.METHODS.values())) == []


def test_a_long_constructor_is_rejected() -> None:
    class Long(methods.METHODS["MeZO"]):  # type: ignore[misc, name-defined]
        def __init__(self, params, a, b, c, d, e, f, *, g=0, h=0, i=0, j=0, k=0, l=0, **options):  # noqa: E741
            super().__init__(params, **options)

    assert long_constructors([Long]) == ["Long has 13 arguments; at most 12"]
