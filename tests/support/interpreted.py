"""Triton's interpreter in a process of its own, beside the tests that do not need what it finds.

Interpretation has to be chosen before triton is imported. A test file that makes an ``Interpreted`` of itself
is run once more, as ``TRITON_INTERPRET=1 python interpreted.py file folder``, and leaves
folder/verdicts.json. conftest.py starts it before the first test; a worker of pytest-xdist, which has another
worker beside it, when it comes to the file.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


class Interpreted:
    def __init__(self, file: str) -> None:
        self.file, self.process, self.found = file, None, None

    def start(self) -> None:
        self.folder = TemporaryDirectory(prefix="zokern-interpreted-")
        path = os.pathsep.join(p for p in sys.path if p)
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore::RuntimeWarning", __file__, self.file, self.folder.name]
        said = open(Path(self.folder.name) / "said", "w")  # a pipe that nobody reads would stop it
        self.process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        atexit.register(self.process.kill)

    def verdicts(self) -> dict[str, str | None]:
        """What the process found, when it has ended."""
        if self.found is None:
            if self.process is None:
                self.start()
            assert self.process is not None
            status = self.process.wait()
            assert status == 0, (Path(self.folder.name) / "said").read_text()[-4000:]
            self.found = json.loads((Path(self.folder.name) / "verdicts.json").read_text())
        return self.found


def patch_once_a_launch() -> None:
    """Makes Triton's interpreter patch its language once in a launch.

    It looks through all names of the language at each call of a function, a third of its time."""
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[tuple, object] = {}

    def scope_of(fn):
        key = tuple(v for v in fn.__globals__.values() if v is language or v is language.core)
        if key not in scopes:
            scopes[key] = patch(fn)
        return scopes[key]

    def launched(self, *arguments, **named):
        scopes.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = scope_of, launched


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    patch_once_a_launch()
    runpy.run_path(sys.argv[0], run_name="__main__")
