"""`make gpu`: is what was proven without a GPU true on one, and how fast is it? One command, under ten
minutes.

    correctness   verbs, backends cuda and triton, bit for bit against the CPU         verbs, checks, replay,
                  graphs
    steps         whole steps over their two forwards, host, memory, kernels           steps, trace
    verbs         GB/s, share of a copy; eager PyTorch, torch.compile, addmm_ beside   dense, factors, linear
    thorough      the suite, large tensors, compute-sanitizer                          checks, large, memcheck
    more          larger models, hardware counters                                     steps, counters

`python -m benchmarks.gpu` runs the parts that plan.py lists, each in a process of its own (worker.py): a
fault of one part leaves the others a device that works, and a part past its time is stopped with what it has
said kept. After every part the record and the page are written anew (record.py, page.py). A part is a
function of a Run (run.py): told a device, it says what it finds; so everything but the times can be run, and
is tested, on a machine without a GPU (tests/bench/test_gpu.py).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use_tree() -> None:
    """Makes this source tree importable as it is: tests/support/ on the path, and triton_kernels/ where an
    installed zokern has it."""
    if str(ROOT / "tests" / "support") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
    import zokern

    name, folder = "zokern.triton_kernels", ROOT / "triton_kernels"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = zokern.triton_kernels = module = importlib.util.module_from_spec(spec)  # type: ignore[attr-defined]
    try:
        spec.loader.exec_module(module)
    except Exception:  # no triton, or one that is too old: backends.triton says so
        del sys.modules[name], zokern.triton_kernels  # type: ignore[attr-defined]
