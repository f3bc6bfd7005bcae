"""What runs here: versions, the processor,
each backend with the reason when it is off, and what the build contains.

The first thing to attach to a report: `python -m zokern info`, or with --json for a program.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

from .. import backends, stream

PACKAGES = ("zokern", "torch", "triton", "transformers", "peft", "numpy")
VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "ZOKERN_CPU_ISA",
    "ZOKERN_BUILD_CPU",
    "ZOKERN_BUILD_CUDA",
    "ZOKERN_CUDA_ARCHITECTURES",
    "CXX",
    "NVCC",
    "CUDA_HOME",
    "MAX_JOBS",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extension(name: str) -> Any:
    """zokern._cpu or zokern._cuda, or None where it was not built or does not load;
    its backend says which."""
    try:
        return importlib.import_module(f"zokern.{name}")
    except ImportError:
        return None


def _why_off(name: str) -> str | None:
    # A backend that fails in an unforeseen way is what a report is for, so it must not stop this one.
    try:
        return backends.why_off(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}; please report it with this text"


def gather() -> dict[str, Any]:
    """The report as plain data: versions, cpu, gpus, backends (name to null or reason), build,
    environment."""
    try:
        build = importlib.import_module("zokern._build").RECORD
    except ImportError:
        build = None
    cpu, cuda = _extension("_cpu"), _extension("_cuda")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in PACKAGES},
        "stream": stream.VERSION,
        "cpu": {
            "instruction_set": None if cpu is None else cpu.implementation(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "gpus": gpus,
        "cuda_architectures": None if cuda is None else cuda.architectures(),
        "backends": {name: _why_off(name) for name in backends.BACKENDS},
        "build": build,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _lines(report: dict[str, Any]) -> list[str]:
    cpu, build = report["cpu"], report["build"]
    versions = [f"{name} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines = [
        f"versions     {', '.join(versions)}",
        f"             Python {report['python']}, {report['platform']}; stream version {report['stream']}",
        f"cpu          {cpu['threads']} threads on {cpu['cores']} cores, kernels for "
        f"{cpu['instruction_set'] or 'none'}",
        f"gpu          {', '.join(report['gpus']) or 'none that torch can use'}",
    ]
    for name, reason in report["backends"].items():
        lines.append(f"backend      {name:<10} {'on' if reason is None else 'off: ' + reason}")
    if build is None:
        lines.append("build        no record: this tree was never built; run make build, or pip install .")
    else:
        lines.append(f"build        commit {build['commit'] or 'unknown'}")
        for name, part in build["parts"].items():
            targets = part.get("instruction_sets") or part["architectures"]
            lines += [
                f"             {name}: {' '.join(targets)}",
                f"             {name}: {part['compiler']}, {part['flags']}",
            ]
        lines += [f"             without {name}: {reason}" for name, reason in build["left_out"].items()]
    variables = " ".join(f"{name}={value}" for name, value in report["environment"].items())
    return [*lines, f"environment  {variables or 'none of the variables that matter is set'}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="zokern info", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args(argv)
    report = gather()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report)))
    return 0
