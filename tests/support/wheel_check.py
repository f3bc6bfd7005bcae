"""Checks a wheel as a stranger installs it: `python tests/support/wheel_check.py dist/zokern-*.whl`.

    --python PYTHON  an interpreter; repeat it. Each gets a new environment. Default: this one
    --torch VERSION  is installed there from the package index; default: the torch of PYTHON is borrowed
    --need BACKEND   has to run there; repeat it. Default: cpu, where the wheel has its kernels

The file: its size, what it holds, that its modules link neither torch nor a driver, and the oldest manylinux
tag that their symbols allow. The environments: every backend that runs gives the bits of the reference for
each verb, and a training step has the same weights on all. Exit status 1 where something fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

LARGEST = 10 << 20  # bytes
WANTED = (
    "zokern/__init__.py", "zokern/py.typed", "zokern/_build.py", "zokern/triton_kernels/__init__.py",
    "zokern/training/run.py", "zokern/cli/train.py", "zokern/cli/bench.py",
)  # fmt: skip
# libgomp: torch has loaded its own, or the system's; the others are of every manylinux policy
LINKED = {
    "libc",
    "libm",
    "libgcc_s",
    "libstdc++",
    "libgomp",
    "libpthread",
    "libdl",
    "librt",
    "ld-linux-x86-64",
}
# manylinux_2_x by glibc 2.x, with the newest symbols of libstdc++ that it may have (PEP 600, auditwheel)
POLICIES = {17: (19, 7), 24: (22, 10), 28: (24, 11), 31: (28, 12), 34: (29, 13), 35: (30, 13), 39: (33, 15)}

SMOKE = """
import json, sys, torch, zokern
from zokern import backends

def run(kind):
    name = dict(seed=3, who="w", backend=kind)
    x = torch.linspace(-1.0, 1.0, 2 * 1001).reshape(2, 1001)
    found = [zokern.draw("normal", 1001, step=1, **name), zokern.draw("rademacher", 77, step=1, **name)]
    found.append(zokern.axpy_(x.clone(), "normal", draws=[(0, 0), (1, 0)], coeffs=[0.1, 0.2], **name))
    found += [side for side in zokern.perturb(x, "normal", step=2, **name)]
    left, right = torch.ones(2, 3), torch.arange(3003.0).reshape(1001, 3) / 3003
    found.append(zokern.lowrank_(x.clone(), left, right, scale=0.5, backend=kind))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    opt = zokern.MeZO(model, lr=1e-2, seed=0, backend=kind, evaluation="master")
    for _ in range(3):
        zokern.step(opt, lambda: model(torch.ones(3, 16)).square().mean())
    return found + [p.detach() for p in model.parameters()]

def flat(found):
    return torch.cat([t.reshape(-1) for one in found for t in (one if isinstance(one, list) else [one])])

definition, said = flat(run("reference")), {}
for kind in backends.BACKENDS:
    why = backends.why_off(kind)
    if kind == "cuda" and why is None:
        why = "not asked: the tensors here are of the CPU"
    same = why is None and torch.equal(flat(run(kind)), definition)
    said[kind] = f"off: {why}" if why else "equal" if same else "other bits"
print(json.dumps({"torch": torch.__version__, "python": sys.version.split()[0],
                  "zokern": zokern.__file__, "backends": said}))
"""


def problems(names: Iterable[str]) -> list[str]:
    """Returns what a wheel of zokern lacks, and what it holds and must not."""
    names = list(names)
    found = [f"lacks {name}" for name in WANTED if name not in names]
    found += [
        f"lacks {name}"
        for name in ("LICENSE", "entry_points.txt")
        if not any(n.endswith(f"/{name}") for n in names)
    ]
    for name in names:
        if not (name.startswith("zokern/") or name.split("/")[0].endswith(".dist-info")):
            found.append(f"installs {name} beside the package")
        if any(part in ("tests", "benchmarks", "csrc", "zo") for part in name.split("/")):
            found.append(f"ships {name}, which is for developers")
    return found


def linked(dump: str) -> list[str]:
    """Returns the libraries that a module links, of `objdump -p`, and that a wheel must not ask for."""
    needed = re.findall(r"NEEDED\s+(\S+)", dump)
    return [name for name in needed if re.split(r"\.so", name)[0] not in LINKED]


def oldest(dump: str) -> int | None:
    """Returns x of the oldest tag manylinux_2_x that the symbols of `objdump -p` allow, or None."""

    def newest(kind: str, places: int) -> int:
        versions = re.findall(rf"\b{kind}_" + r"(\d+)\." * places + r"(\d+)\b", dump)
        return max((int(version[-1]) for version in versions), default=0)

    needs = newest("GLIBC", 1), newest("GLIBCXX", 2), newest("CXXABI", 2)
    return next((x for x, own in POLICIES.items() if needs[0] <= x and needs[1:] <= own
                 and needs[1] <= own[0] and needs[2] <= own[1]), None)  # fmt: skip


def check_file(wheel: Path) -> list[str]:
    """Returns what is wrong with the file; prints its size and the tag that its symbols allow."""
    found = []
    if wheel.stat().st_size > LARGEST:
        found.append(f"has {wheel.stat().st_size:,} bytes; at most {LARGEST:,} are meant")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += problems(names)
        tags = []
        for name in names:
            if name.endswith(".so"):
                dump = subprocess.run(
                    ["objdump", "-p", archive.extract(name, folder)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
                found += [f"{name} links {other}" for other in linked(dump)]
                tags.append(oldest(dump))
    allowed = "any" if not tags else "none" if None in tags else f"manylinux_2_{max(tags)}"
    print(
        f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MB, {len(names)} files; its symbols allow "
        f"{allowed}"
    )
    return found


def environment(folder: Path, python: str, torch: str | None) -> Path:
    """Returns the interpreter of a new environment, with torch and without zokern."""
    call(python, "-m", "venv", "--without-pip", folder)
    inside = folder / "bin" / "python"
    if torch:
        pip(inside, f"torch=={torch}", "numpy")
    else:  # a path in a .pth file is importable; the .pth files that lie there do not run
        there = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        here = call(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(here, "borrowed.pth").write_text(there + "\n")
    return inside


def pip(python: Path, *what: object) -> None:
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", *what)


def call(*command: object) -> str:
    """Returns what a command prints, outside of this checkout and without its variables."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=clean, cwd=tempfile.gettempdir()
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_run(wheel: Path, python: str, torch: str | None, need: Iterable[str]) -> list[str]:
    """Returns what is wrong in an environment of an interpreter; prints what ran."""
    with tempfile.TemporaryDirectory() as folder:
        inside = environment(Path(folder, "venv"), python, torch)
        pip(inside, "--no-deps", "--ignore-installed", wheel.resolve())
        said = json.loads(call(inside, "-c", SMOKE).splitlines()[-1])
        where = f"Python {said['python']}, torch {said['torch']}"
        print(where + "".join(f"\n    {kind:10} {how}" for kind, how in said["backends"].items()))
        found = [
            f"{where}: {kind} gives other bits"
            for kind, how in said["backends"].items()
            if how == "other bits"
        ]
        found += [
            f"{where}: {kind} is {said['backends'][kind]}"
            for kind in need
            if said["backends"][kind] != "equal"
        ]
        if not said["zokern"].startswith(folder):
            found.append(f"{where}: zokern is imported from {said['zokern']}, which is not the wheel")
        return found


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("wheel", type=Path)
    parse.add_argument("--python", action="append")
    parse.add_argument("--torch", metavar="VERSION")
    parse.add_argument("--need", action="append")
    options = parse.parse_args()
    wrong = check_file(options.wheel)
    pure = options.wheel.name.endswith("none-any.whl")
    need = options.need or (["reference"] if pure else ["reference", "cpu"])
    for python in options.python or [sys.executable]:
        wrong += check_run(options.wheel, python, options.torch, need)
    print("\n".join(f"wrong: {one}" for one in wrong) or "the wheel is sound")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
