"""A Triton that is too old, or broken, is a reason of backend triton to be off, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLD = """
__version__ = "3.2.0"

def jit(fn=None, **_):
    return fn or jit
"""
# what `import triton` and `import zokern.triton_kernels` meet
BROKEN = {
    "3.2 has no knobs": (OLD, "no attribute 'knobs'", "triton is 3.2.0"),
    "a library that does not load": ("raise OSError('libtriton.so: no such file')", "OSError", "missing"),
    "an odd Python": ("raise SyntaxError('invalid syntax')", "SyntaxError", "missing"),
}
ASK = """
import torch, zokern
zokern.__path__.append({root!r})  # triton_kernels lies there in an installed zokern
from zokern import backends
print(backends.why_off("triton"))
print(backends.resolve(None, torch.device("cpu")).name)
"""


@pytest.mark.parametrize("broken", BROKEN)
def test_it_is_a_reason(tmp_path, broken) -> None:
    text, error, version = BROKEN[broken]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(text)
    (tmp_path / "triton" / "language.py").write_text("constexpr = lambda value: value\n")
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    program = ASK.format(root=root)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason, default = done.stdout.splitlines()
    assert error in reason and version in reason and "install triton 3.6 to 3.9" in reason
    assert default in ("cpu", "reference")
