"""Peak memory of one process: a forward, then steps. `python -m benchmarks.memory fp32 4 128 64` prints JSON, bytes.

The kernel's high-water mark (VmHWM) is read after the forwards, set back (clear_refs) and read again after the steps, so that
loading the model does not hide what a step takes. Scratch and Paired run without the comparison of a first step, which takes a copy of the
weights for its time. budget 'eager' runs the eager loop, 'inplace' and 'master' step so; 'SubZero', 'LOZO', 'PGAP' and
'TeZO' run that method paired, 'eager SubZero' and so on its eager loop. 'doubled' is a forward of twice the batch: its activations.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import warnings
from pathlib import Path

import torch

import zokern

from . import eager
from .eager_methods import LOOPS
from .models import loss_of, opt_125m


def _high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def _reset() -> bool:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main(dtype: str, batch: int, length: int, budget: str, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model = opt_125m(dtype)
    loss = loss_of(model, batch, length)
    exact = _reset()
    with torch.no_grad():
        for _ in range(3):
            loss()
    forward = _high_water()
    _reset()
    scratch = 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    if budget == "doubled":
        twice = loss_of(model, 2 * batch, length)
        with torch.no_grad():
            for _ in range(3):
                twice()
    elif budget == "eager":
        for seed in range(2):
            eager.step(parameters, loss, seed, 1e-6, 1e-3)
    elif budget.startswith("eager "):
        step = LOOPS[budget.removeprefix("eager ")](parameters, 1e-6, 1e-3).step
        for seed in range(2):
            step(loss, seed)
    else:
        if budget in LOOPS:
            optimizer = getattr(zokern, budget)(model, lr=1e-6, eps=1e-3, evaluation=zokern.Paired(check=False))
        else:
            evaluation = budget if budget in ("inplace", "master") else zokern.Scratch(int(budget) << 20, check=False)
            optimizer = zokern.MeZO(model, lr=1e-6, eps=1e-3, evaluation=evaluation)
        for _ in range(3):
            scratch = zokern.step(optimizer, loss).scratch_bytes
    return {"forward": forward, "step": _high_water(), "scratch_bytes": scratch, "exact": exact}


if __name__ == "__main__":
    dtype, batch, length, budget, threads = sys.argv[1:6]
    print(json.dumps(main(dtype, int(batch), int(length), budget, int(threads))))
