"""What was measured on: the device, its clocks under load, the driver, the versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from datetime import date
from importlib import metadata

import torch

import zokern

from ..report import commit
from .run import Run, judge

PACKAGES = ("torch", "triton", "transformers", "matplotlib")
QUERY = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "temperature.gpu",
)


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first device; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values)) if done.returncode == 0 and len(values) == len(fields) else {}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def busy() -> None:
    """About a second of matrix products, left running: clocks are read under load."""
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    stop = time.monotonic() + 0.5
    while time.monotonic() < stop:
        matrix @ matrix
        torch.cuda.synchronize()
    for _ in range(400):
        matrix @ matrix


def facts(run: Run) -> None:
    found = {
        "name": platform.processor() or platform.machine(), "memory_gb": "", "multiprocessors": "",
        "capability": "", "l2_mb": "",
        "python": platform.python_version(), "zokern": zokern.__version__, "commit": commit(),
        "date": date.today().isoformat(),
        "cuda": torch.version.cuda or "none", **{package: version(package) for package in PACKAGES},
    }  # fmt: skip
    found |= {"torch": torch.__version__, "judge": judge().name}
    if run.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "memory_gb": f"{properties.total_memory / 1e9:.1f}",
            "multiprocessors": str(properties.multi_processor_count),
            "capability": f"{properties.major}.{properties.minor}",
            "l2_mb": f"{getattr(properties, 'L2_cache_size', 0) / 1e6:.0f}",
        }
        busy()
        found |= {key.replace(".", "_"): value for key, value in smi(*QUERY).items() if key != "name"}
    run.say("device", **found)
