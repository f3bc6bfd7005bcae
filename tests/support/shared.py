"""What one process of a session makes and the others read: a folder that the workers inherit."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

VARIABLE = "ZOKERN_TESTS_SHARED"
if VARIABLE not in os.environ:
    OWN = TemporaryDirectory(prefix="zokern-tests-")
    os.environ[VARIABLE] = OWN.name
FOLDER = Path(os.environ[VARIABLE])


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder of this name after make(folder) has filled it, which happens once in a session."""
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds it done
        if not (folder / "done").exists():
            make(folder)
            (folder / "done").touch()
    return folder
