"""Builds what this machine can build, and says what it built.

    nvcc, a C++ compiler, a GPU   zokern._cpu and, for the GPUs of this machine, zokern._cuda
    a C++ compiler                zokern._cpu
    neither                       pure Python: the PyTorch reference, and Triton where it is installed

Environment
    ZOKERN_BUILD_CPU            0: leave the CPU kernels out; 1: fail when they cannot be built; unset: build
                                them if possible
    ZOKERN_BUILD_CUDA           the same for the CUDA kernels; 1 on a machine without a GPU: all architectures
    ZOKERN_CUDA_ARCHITECTURES   all, or numbers such as "80;90": compile for these, with or without a GPU;
                                unset: the GPUs here
    CXX, NVCC, CUDA_HOME        compilers, where the ones on PATH are not meant
    MAX_JOBS                    how many compilers run at once; unset: one per core

torch is not imported here: the kernels take raw pointers, and one wheel serves every torch version.
"""

from __future__ import annotations

import functools
import os
import platform
import pprint
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Objects that know no Python serve every version of it; bind.o and the modules are of this one.
OBJECTS = "build/native"
BOUND = f"{OBJECTS}/{sysconfig.get_config_var('SOABI')}"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
BEAT = 30.0  # seconds to the next line that says that compilers run

# No contraction: the stream writes out each fused multiply-add that it wants, and has no other. GCC 12 takes
# the registers that its own AVX-512 intrinsics leave undefined for our mistake, thousands of times: hence
# -Wno-maybe-uninitialized.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fopenmp"
CXX_FLAGS += " -Wall -Wextra -Wno-maybe-uninitialized"
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
    "scalar": "",
}
LINEAR_FLAGS = {"avx512bf16": f"{ISA_FLAGS['avx512']} -mavx512bf16"}  # only products have a use for it
NVCC_FLAGS = "-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off"
CPU_SOURCES = ("elementwise", "update", "lowrank", "linear")
# Objects of csrc/*.cu, the slowest first, and their definitions: axpy.cu is compiled once for each rounding.
CUDA_OBJECTS = {"update": ""}
CUDA_OBJECTS |= {
    f"axpy.{name.lower()}": f"-DZOKERN_ROUNDING=k{name}" for name in ("Stochastic", "Residual", "Nearest")
}
CUDA_OBJECTS |= {"lowrank": "", "elementwise": "", "project": ""}
CUDA_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
OLDEST = 80  # the kernels have bfloat16 instructions, which older GPUs lack
# PTX of the first of a family is the machine code of all of it: the slower half of nvcc runs 3 times, not 6.
FAMILY = {"86": "80", "89": "80", "120": "100"}


class Missing(Exception):
    """Why a part cannot be built on this machine, and what would change that."""


@dataclass
class Part:
    name: str
    record: dict[str, object]  # what it is built with, for `python -m zokern info`
    rules: list[str]  # lines of build.ninja that end in `output`

    @property
    def targets(self) -> str:
        return " ".join(self.record.get("instruction_sets") or self.record["architectures"])

    @property
    def output(self) -> str:
        return f"{BOUND}/_{self.name}{SUFFIX}"

    def bind_rule(self) -> str:
        rule = f"build {BOUND}/{self.name}/bind.o: cxx csrc/bind.cpp"
        return f"{rule}\n  flags = $python -DZOKERN_MODULE=_{self.name}"


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout.strip()


def quote(word: str) -> str:
    """A word of a command in build.ninja."""
    return shlex.quote(word).replace("$", "$$")


@functools.cache
def find_cxx() -> str:
    """The C++ compiler, after it has built a Python extension with OpenMP."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    cxx = next(filter(None, map(shutil.which, names)), None)
    if cxx is None:
        raise Missing(f"no C++ compiler ({', '.join(names)}) on PATH; install g++, or set CXX")
    for module in ("pybind11", "ninja"):
        try:
            __import__(module)
        except ImportError:
            raise Missing(
                f"{module} is not installed; pip install {module}, or build with isolation"
            ) from None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
        )
        include = f"-I{sysconfig.get_path('include')}"
        try:
            run(cxx, *CXX_FLAGS.split(), include, "-shared", str(source), "-o", str(Path(folder, "probe.so")))
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1]).split("error: ")[-1]
            raise Missing(
                f"{cxx} cannot build a Python extension with OpenMP ({reason}); install the Python headers "
                "(python3-dev) and a compiler with OpenMP"
            ) from None
    return cxx


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if os.environ.get("NVCC"):
        nvcc = shutil.which(os.environ["NVCC"])
    else:
        nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if nvcc is None:
        raise Missing("no nvcc on PATH; install the CUDA toolkit, or set NVCC or CUDA_HOME")
    return nvcc


def gpus() -> list[int]:
    """Compute capabilities of this machine's GPUs, 90 for 9.0, as nvidia-smi names them."""
    try:
        answer = run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", answer, re.M)})


def architectures_for(known: list[str]) -> list[str]:
    """What to compile for, of the architectures that nvcc knows:
    as the environment asks, or else for the GPUs here."""
    asked, here = os.environ.get("ZOKERN_CUDA_ARCHITECTURES", "").strip(), gpus()
    if not asked and not here and os.environ.get("ZOKERN_BUILD_CUDA") == "1":
        asked = "all"
    if asked:
        every = [a for a in CUDA_ARCHITECTURES if a in known]
        found = every if asked == "all" else re.findall(r"\d+[af]?", asked.replace(".", ""))
        if not found or not set(found) <= set(known):
            raise Missing(f"nvcc compiles for {' '.join(known)}; asked for {' '.join(found) or asked}")
        return found
    way_out = "ZOKERN_CUDA_ARCHITECTURES=all, or a number such as 90, compiles them all the same"
    if not here:
        raise Missing(f"nvidia-smi finds no GPU on this machine; {way_out}")
    # A GPU newer than nvcc compiles PTX of the newest architecture before it, when it loads the module.
    numbers = [int(a) for a in known if a.isdigit() and int(a) >= OLDEST]
    able = {max(n for n in numbers if n <= gpu) for gpu in here if gpu >= min(numbers, default=gpu + 1)}
    if not able:
        raise Missing(
            f"the GPU here has compute capability {here[-1] / 10}, and the kernels need {OLDEST / 10}; "
            f"{way_out}"
        )
    return list(map(str, sorted(able)))


def knows(cxx: str, flags: str) -> bool:
    """Whether the compiler has these instructions: GCC 10 and Clang 9 are the first with avx512bf16."""
    return not subprocess.run(
        [cxx, *flags.split(), "-E", "-x", "c++", os.devnull], cwd=ROOT, capture_output=True, timeout=300
    ).returncode


def cpu() -> Part:
    """bind.cpp, isa.cpp and project.cpp; the other verbs' sources once per instruction set, and once more for
    the part that shares the work out."""
    cxx = find_cxx()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = ISA_FLAGS if x86 else {"scalar": ""}
    products = {isa: flags for isa, flags in LINEAR_FLAGS.items() if x86 and knows(cxx, flags)}
    record = {
        "compiler": run(cxx, "--version").splitlines()[0],
        "flags": CXX_FLAGS,
        "instruction_sets": [*products, *isas],
    }
    part = Part("cpu", record, [])
    objects = [f"{BOUND}/cpu/bind.o", *(f"{OBJECTS}/cpu/{name}.o" for name in ("isa", "project"))]
    part.rules += [
        part.bind_rule() + " -DZOKERN_LOWRANK_CPU -DZOKERN_UPDATE -DZOKERN_LINEAR",
        f"build {objects[1]}: cxx csrc/isa.cpp\n"
        f"  flags = {' '.join(f'-DZOKERN_{isa.upper()}' for isa in products)}",
        f"build {objects[2]}: cxx csrc/project.cpp",
    ]
    for source in CPU_SOURCES:
        objects.append(f"{OBJECTS}/cpu/{source}.o")
        part.rules.append(f"build {objects[-1]}: cxx csrc/{source}.cpp")
        for isa, flags in {**isas, **(products if source == "linear" else {})}.items():
            objects.append(f"{OBJECTS}/cpu/{source}.{isa}.o")
            part.rules.append(
                f"build {objects[-1]}: cxx csrc/{source}.cpp\n"
                f"  flags = -DZOKERN_ISA={isa} {flags}\n"
                f"  of = for {isa}"
            )
    part.rules.append(f"build {part.output}: link {' '.join(objects)}")
    return part


def cuda() -> Part:
    """bind.cpp and CUDA_OBJECTS for each architecture, with the CUDA runtime inside:
    the module loads without a driver."""
    cxx, nvcc = find_cxx(), find_nvcc()
    release = re.search(r"release (\d+)\.(\d+).*V([\d.]+)", run(nvcc, "--version"), re.S)
    if release is None:
        raise Missing(f"{nvcc} --version does not name a release; set NVCC to a CUDA compiler")
    architectures = architectures_for(re.findall(r"sm_(\w+)", run(nvcc, "--list-gpu-code")))
    codes: dict[str, list[str]] = {}
    for a in architectures:
        codes.setdefault(FAMILY.get(a, a), []).append(f"sm_{a}")
    # The last family's PTX is what a newer device compiles when it loads the module.
    newest = f"compute_{list(codes)[-1]}"
    codes[list(codes)[-1]].append(newest)
    targets = " ".join(
        f"-gencode arch=compute_{family},code=[{','.join(names)}]" for family, names in codes.items()
    )
    commas = r"\,"  # nvcc takes a bare one for the end of the definition
    targets += f" '-DZOKERN_ARCHITECTURES={commas.join(re.findall('sm_([0-9]+)', targets))}'"
    targets += f" -DZOKERN_PTX={re.sub('[^0-9]', '', newest)}"
    small = "--compress-mode=size" if (int(release[1]), int(release[2])) >= (12, 8) else ""
    verbose = subprocess.run(
        [nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True, timeout=300
    ).stderr
    folders = re.search(r"^#\$ LIBRARIES=(.*)$", verbose, re.M)
    record = {
        "compiler": f"nvcc {release[3]}",
        "flags": f"{NVCC_FLAGS} {small}".strip(),
        "architectures": [f"sm_{a}" for a in architectures] + [newest],
        "left_out": [f"sm_{a}" for a in CUDA_ARCHITECTURES if a not in architectures],
    }
    part = Part("cuda", record, [])
    # A folder for each set of architectures: a build for another set leaves these objects as they are.
    objects = {name: f"{OBJECTS}/cuda-{'-'.join(architectures)}/{name}.o" for name in CUDA_OBJECTS}
    threads = -(-JOBS // len(objects))
    of = f"for {' '.join(f'sm_{a}' for a in architectures)}"
    # --exclude-libs: the runtime inside must not be replaced by the one that torch may have loaded, of
    # another version.
    libraries = shlex.split(folders[1]) if folders else []
    part.rules += [
        "rule nvcc\n"
        "  description = nvcc $in $of\n"
        f"  command = {quote(nvcc)} -ccbin {quote(cxx)} $flags -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n"
        "  deps = gcc",
        part.bind_rule() + " -DZOKERN_LOWRANK_CUDA -DZOKERN_UPDATE",
        *(
            f"build {objects[name]}: nvcc csrc/{name.split('.')[0]}.cu\n"
            f"  flags = {record['flags']} {targets} --threads {threads} {definition}\n"
            f"  of = {definition} {of}"
            for name, definition in CUDA_OBJECTS.items()
        ),
        f"build {part.output}: link {BOUND}/cuda/bind.o {' '.join(objects.values())}\n"
        f"  libraries = {' '.join(map(quote, libraries))} -lcudart_static -ldl -lpthread -lrt "
        "-Wl,--exclude-libs,ALL",
    ]
    return part


def plan() -> tuple[list[Part], dict[str, str]]:
    """The parts to build, and for each other part why it is left out."""
    parts, left_out = [], {}
    for name, make in {"cpu": cpu, "cuda": cuda}.items():
        variable = f"ZOKERN_BUILD_{name.upper()}"
        switch = os.environ.get(variable, "")
        if switch not in ("", "0", "1"):
            raise SystemExit(
                f"zokern: {variable} is {switch!r}; expected 0 (leave out), 1 (fail when impossible) or "
                "nothing"
            )
        if switch == "0":
            left_out[name] = f"{variable} is 0; unset it and build again"
            continue
        try:
            parts.append(make())
        except Missing as reason:
            if switch == "1":
                raise SystemExit(f"zokern: {variable} is 1, but {reason}") from None
            left_out[name] = str(reason)
    return parts, left_out


def commit() -> str | None:
    """The commit that is built, with a + when files differ from it; None outside a checkout."""
    try:
        if Path(run("git", "rev-parse", "--show-toplevel")) != ROOT:
            return None
        changed = "+" if run("git", "status", "--porcelain") else ""
        return run("git", "rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None


def finish(package: Path) -> None:
    """Puts the modules and the record of the build,
    zokern/_build.py, into the package, and says what was built."""
    record = {"commit": commit(), "parts": {part.name: part.record for part in PARTS}, "left_out": LEFT_OUT}
    shown = pprint.pformat(record, width=120, sort_dicts=False)
    text = f'"""What setup.py built; written by it."""\n\nRECORD = {shown}\n'
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.py").write_text(text)
    for stale in {*package.glob(f"_c*{SUFFIX}")} - {package / Path(part.output).name for part in PARTS}:
        stale.unlink()
    for part in PARTS:  # renamed into place: a process that has the old module loaded keeps it whole
        new = shutil.copy2(ROOT / part.output, package / f"{part.name}.new")
        os.replace(new, package / Path(part.output).name)
        print(f"zokern: built {part.name}: {part.targets} ({part.record['compiler']})", flush=True)
    for name, reason in LEFT_OUT.items():
        print(f"zokern: left out {name}: {reason}", flush=True)


class BuildPython(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # what an earlier build with other switches left there would be shipped
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not PARTS:  # then setuptools does not call BuildNative
            finish(ROOT / "zokern" if self.editable_mode else Path(self.build_lib, "zokern"))


class BuildNative(build_ext):
    """Has ninja compile what changed since the last call,
    then puts the modules where setuptools wants them."""

    def run(self) -> None:
        if PARTS:
            self.compile()
        finish(ROOT / "zokern" if self.inplace or self.editable_mode else Path(self.build_lib, "zokern"))

    def compile(self) -> None:
        import ninja
        import pybind11

        python = f"-isystem {quote(pybind11.get_include())} -isystem {quote(sysconfig.get_path('include'))}"
        script = [
            f"builddir = {OBJECTS}",
            f"cxx = {quote(find_cxx())}",
            f"python = {python}",
            "rule cxx\n"
            "  description = c++ $in $of\n"
            f"  command = $cxx {CXX_FLAGS} $flags -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n"
            "  deps = gcc",
            "rule link\n  description = link $out\n  command = $cxx -shared -fopenmp $in $libraries -o $out",
            # nvcc takes longest, so it starts first
            *(rule for part in reversed(PARTS) for rule in part.rules),
        ]
        path = ROOT / BOUND / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(script) + "\n")
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", f"{BOUND}/build.ninja", "-j", str(JOBS)]
        for part in PARTS:
            switch = f"ZOKERN_BUILD_{part.name.upper()}=0 leaves it out"
            print(f"zokern: compiles {part.name}: {part.targets}; {switch}", flush=True)
        # [files compiled, of how many, seconds]; ninja writes a line when a file is done
        environment, started = {"NINJA_STATUS": "[%f of %t, %e s] ", **os.environ}, time.monotonic()
        with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
            while process.poll() is None:
                try:
                    process.wait(BEAT)
                except subprocess.TimeoutExpired:
                    print(f"zokern: still compiling after {time.monotonic() - started:.0f} s", flush=True)
        if process.returncode:
            out = " and ".join(f"ZOKERN_BUILD_{part.name.upper()}=0" for part in PARTS)
            raise SystemExit(f"zokern: the kernels did not compile; {out} build without them")

    def get_outputs(self) -> list[str]:
        return [os.path.join(self.build_lib, "zokern", Path(part.output).name) for part in PARTS]


PARTS, LEFT_OUT = plan()

setup(
    packages=[*find_packages(include=["zokern", "zokern.*"]), "zokern.triton_kernels"],
    # Only the names: BuildNative knows the sources. An empty list makes the wheel a pure one.
    ext_modules=[Extension(f"zokern._{part.name}", []) for part in PARTS],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
