"""Machine code as text: instructions, loops and resources of the kernels in zokern._cuda, or of a file
compiled for one architecture.

The tools come with CUDA or with the Triton wheel: ``tool(name)`` finds nvcc, cuobjdump and nvdisasm in both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from shared import once

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = (CSRC / "elementwise.cu", CSRC / "axpy.cu")  # of draw, perturb and axpy_
MODULE = ROOT / "zokern" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# what setup.py compiles with, as far as code generation goes
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
TERM, DECAYED_TERM, TERMS, STEPS = range(4)  # Sum of axpy.cu

# Instructions that the stream's arithmetic must not contain, and why.
# Each pattern is matched at the start of an instruction.
FORBIDDEN = {
    "approximate function unit": r"MUFU",
    "flush to zero": r"\S*\.FTZ",
    "double precision": r"D(ADD|MUL|FMA|SETP|MNMX)|F2F\.F64|F2F\S*\.F64",
    "float division helper": r"FCHK",
    "local memory (a spill or an indexed register)": r"(LDL|STL)\b",
    # ptxas below sm_90 also writes some jumps inside a kernel as CALL.REL.NOINC, and __syncwarp as a call of
    # its own five lines
    "call": r"CALL(?!\S* `\((\.L_x_\d+|\$__internal_\d+_\$__cuda_sm70_warpsync)\))",
}


def tool(name: str) -> str | None:
    """The path of a CUDA tool: on PATH, beside nvcc, or inside the Triton wheel; None when there is none."""
    found = shutil.which(name)
    if found:
        return found
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(place / name) for place in places if (place / name).exists()), None)


def missing() -> str | None:
    """Why machine code cannot be made and read here; None when it can."""
    absent = [name for name in ("nvcc", "cuobjdump", "nvdisasm") if tool(name) is None]
    return (
        f"{', '.join(absent)} not found: install the CUDA toolkit (nvcc) and CUDA binary utilities or Triton"
        if absent
        else None
    )


def compile_to(output: Path, arch: str, *flags: str, kind: str = "cubin", source: Path) -> Path:
    """nvcc -cubin or -ptx of one source file for sm_<arch>; the path of the output."""
    nvcc = tool("nvcc")
    assert nvcc is not None
    command = [
        nvcc,
        *NVCC_FLAGS,
        f"-{kind}",
        f"-arch=sm_{arch}",
        "-I",
        str(CSRC),
        *flags,
        "-o",
        str(output),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed for sm_{arch}:\n{done.stderr}")
    return output


def included(source: Path) -> set[Path]:
    """A file and all that it includes by a name in quotes."""
    found, todo = set(), [source]
    while todo:
        path = todo.pop()
        if path.exists() and path not in found:
            found.add(path)
            names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
            todo += [folder / name for name in names for folder in (path.parent, CSRC)]
    return found


def shipped(
    sources: Sequence[Path], namespace: str, folder: Path, module: Path = MODULE, kind: str = "cubin"
) -> dict[str, list[Path]]:
    """The cubins, or the PTX, by architecture that zokern._cuda has of some source files,
    whose kernels are all in one namespace of zo.

    None where a file that the sources are made of is newer than the module.
    """
    cuobjdump = tool("cuobjdump")
    files = set().union(*map(included, sources))
    if (
        cuobjdump is None
        or not module.exists()
        or module.stat().st_mtime < max(f.stat().st_mtime for f in files)
    ):
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    extract = {"cubin": "-xelf", "ptx": "-xptx"}[kind]
    subprocess.run([cuobjdump, extract, "all", str(module)], cwd=folder, capture_output=True, check=True)
    symbols = f"_ZN2zo{len(namespace)}{namespace}".encode()
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*.{kind}")):
        if symbols in path.read_bytes():
            found.setdefault(path.suffixes[-2][len(".sm_") :], []).append(path)
    return found


@cache
def machine_code(
    sources: tuple[Path, ...] = SOURCES,
    namespace: str = "kernels",
    architectures: Sequence[str] = ARCHITECTURES,
) -> dict[str, dict[str, Function]]:
    """All kernels of some source files by architecture and symbol.

    They are read from zokern._cuda, so that what is checked is what ships and nothing is compiled twice. An
    architecture that the module lacks is compiled here, and so is every architecture where a source is newer
    than the module.
    """
    with TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        built = shipped(sources, namespace, folder / "module")

        def one(arch: str) -> dict[str, Function]:
            cubins = built.get(arch) or [
                compile_to(folder / f"{source.stem}.sm_{arch}.cubin", arch, source=source)
                for source in sources
            ]
            return {name: function for cubin in cubins for name, function in disassemble(cubin).items()}

        return dict(zip(architectures, pool.map(one, architectures)))


@cache
def device_text(sources: tuple[Path, ...] = SOURCES, namespace: str = "kernels") -> str:
    """The PTX of some source files: zokern._cuda's, or what is compiled here for sm_90 where a source is
    newer than the module."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        built = shipped(sources, namespace, folder / "module", kind="ptx").values()
        files = next(iter(built), None) or [
            compile_to(folder / f"{source.stem}.ptx", "90", kind="ptx", source=source) for source in sources
        ]
        return "\n".join(file.read_text() for file in files)


@dataclass
class Instruction:
    address: int
    name: str  # mnemonic with modifiers, without predicate: LDG.E.128
    text: str

    @property
    def body(self) -> str:
        """Without the predicate."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text)


@dataclass
class Function:
    """One kernel: its instructions in order, where its labels stand, and its registers and memory."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    stack: int = 0
    local: int = 0

    def loops(self) -> list[list[Instruction]]:
        """The bodies of all loops: from a label to a branch back to it, shortest first."""
        bodies = []
        for end, instruction in enumerate(self.code):
            if instruction.name.startswith("BRA"):
                target = re.search(r"\((\.L_x_\d+)\)", instruction.text)
                begin = self.labels.get(target[1], end + 1) if target else end + 1
                if begin <= end:
                    bodies.append(self.code[begin : end + 1])
        return sorted(bodies, key=len)

    def forbidden(self) -> dict[str, list[str]]:
        """Instructions that FORBIDDEN names, by reason."""
        found = {
            why: [i.text for i in self.code if re.match(pattern, i.body)]
            for why, pattern in FORBIDDEN.items()
        }
        return {why: texts for why, texts in found.items() if texts}

    def spilled(self) -> bool:
        return self.stack > 0 or self.local > 0


def histogram(code: list[Instruction]) -> Counter[str]:
    return Counter(i.name for i in code)


def arithmetic(code: list[Instruction]) -> dict[str, int]:
    """How many float32 multiplications, additions and fused multiply-adds:
    equal to the PTX's if nothing was contracted."""
    return {
        name: sum(re.match(rf"{name}\b", i.name) is not None for i in code)
        for name in ("FFMA", "FMUL", "FADD")
    }


def vector_loops(function: Function, loads: int, stores: int) -> list[list[Instruction]]:
    """The loops with this many 16-byte loads and stores and no narrower store, fast paths, shortest first."""
    found = []
    for body in function.loops():
        names = [i.name for i in body]
        wide_loads = sum(n.startswith("LDG") and ".128" in n for n in names)
        wide_stores = sum(n.startswith("STG") and ".128" in n for n in names)
        all_stores = sum(n.startswith("STG") for n in names)
        if (wide_loads, wide_stores, all_stores) == (loads, stores, stores):
            found.append(body)
    return found


def vector_loop(function: Function, loads: int, stores: int, longer: int = 0) -> list[Instruction]:
    """The shortest of them; `longer` passes over as many."""
    found = vector_loops(function, loads, stores)
    if len(found) <= longer:
        raise LookupError(f"{function.name}: no loop with {loads} 16-byte loads and {stores} 16-byte stores")
    return found[longer]


def tile(
    function: Function, loads: int, stores: int, unrolled: int = 4
) -> tuple[list[Instruction], list[Instruction]]:
    """The loop over tiles of signs (walk.h, sign_tiles) and the loop over steps inside it.

    The outer one writes shared memory; a turn of the inner one has `unrolled` steps, each with this many
    16-byte loads and stores.
    """
    for outer in function.loops():
        if not any(i.name.startswith("STS") for i in outer):
            continue
        for inner in function.loops():
            names = [i.name for i in inner]
            reads = sum(n.startswith("LDS") for n in names)
            wide = [sum(n.startswith(op) and ".128" in n for n in names) for op in ("LDG", "STG")]
            inside = outer[0].address <= inner[0].address and inner[-1].address < outer[-1].address
            if inside and (reads, *wide) == (unrolled, unrolled * loads, unrolled * stores):
                return outer, inner
    raise LookupError(f"{function.name}: no tile with {loads} 16-byte loads and {stores} stores a step")


@dataclass
class Run:
    """The loops of `sums` or `steps` in axpy.cu over normal terms,
    by how often an instruction runs for a thread's units."""

    units: int  # of eight elements, that a thread has in a turn
    turn: list[Instruction]  # once for one sum, or for every 32 steps
    four: list[Instruction]  # once for four terms
    one: list[Instruction]  # once for each term that is left

    def term(self) -> float:
        """Instructions for each element and each of four terms."""
        return len(self.four) / 4 / 8 / self.units

    def instructions(self, count: int) -> list[tuple[list[Instruction], float]]:
        """What runs for a sum of `count` <= 32 terms, or for any number of steps, and how often for each
        element. Terms made ready, once for all units, are left out."""
        fours, ones = sum(min(32, count - k) // 4 for k in range(0, count, 32)), count % 4
        often = ((self.turn, -(-count // 32)), (self.four, fours), (self.one, ones))
        return [(code, times / 8 / self.units) for code, times in often]


def many(function: Function, accesses: int = 1) -> Run:
    """Of TERMS or STEPS, with this many 16-byte loads and stores a unit.
    Sums of more than 32 terms have more loops inside."""

    def within(inner: list[Instruction], outer: list[Instruction]) -> bool:
        return (
            inner is not outer
            and outer[0].address <= inner[0].address
            and inner[-1].address <= outer[-1].address
        )

    loops = function.loops()
    for units in (2, 1):
        for outer in vector_loops(function, units * accesses, units * accesses):
            inside = [body for body in loops if within(body, outer)]
            inner = [body for body in inside if not any(within(other, body) for other in inside)]
            counts = [arithmetic(body) for body in inner]
            if (
                len(inner) != 2
                or counts[0]["FFMA"] != 72 * units
                or any(4 * counts[0][n] != counts[1][n] for n in counts[0])
            ):
                continue
            one, four = inner
            turn = [
                i
                for i in outer
                if not any(body[0].address <= i.address <= body[-1].address for body in inner)
            ]
            return Run(units, turn, four, one)
    raise LookupError(f"{function.name}: no loop over four terms and one over the terms that are left")


def per_lane(function: Function, loads: int, stores: int, steps: int = 16, unrolled: int = 4) -> float:
    """Instructions for each unit of eight elements in a tile. Code around the steps is counted whole, also
    what is only run after a result that is inf."""
    outer, inner = tile(function, loads, stores, unrolled)
    return len(inner) / unrolled + (len(outer) - len(inner)) / steps


def written(cubin: Path) -> tuple[str, str]:
    """What nvdisasm and cuobjdump write about a cubin, once in a session: several files of tests read it."""

    def make(folder: Path) -> None:
        nvdisasm, cuobjdump = tool("nvdisasm"), tool("cuobjdump")
        assert nvdisasm is not None and cuobjdump is not None
        for name, command in (("code", [nvdisasm, "-c"]), ("usage", [cuobjdump, "-res-usage"])):
            done = subprocess.run([*command, str(cubin)], capture_output=True, text=True, check=True)
            (folder / name).write_text(done.stdout + done.stderr)

    folder = once(f"sass-{hashlib.sha256(cubin.read_bytes()).hexdigest()[:16]}", make)
    return (folder / "code").read_text(), (folder / "usage").read_text()


def disassemble(cubin: Path) -> dict[str, Function]:
    """All kernels of a cubin by symbol."""
    text, usage = written(cubin)
    functions: dict[str, Function] = {}
    current = None
    for line in text.splitlines():
        if line.startswith(".text."):
            current = functions.setdefault(
                line[len(".text.") :].rstrip(":"), Function(line[len(".text.") :].rstrip(":"))
            )
        elif current is not None and (label := re.match(r"(\.L_x_\d+):", line)):
            current.labels[label[1]] = len(current.code)
        elif current is not None and (found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)):
            body = re.sub(r"^@!?U?P\w+\s+", "", found[2].lstrip("{ "))
            current.code.append(Instruction(int(found[1], 16), body.split()[0], found[2]))
    pattern = r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for name, registers, stack, local in re.findall(pattern, usage):
        if name in functions:
            functions[name].registers, functions[name].stack = int(registers), int(stack)
            functions[name].local = int(local)
    return functions


def symbol(verb: str, direction: int = 0, rounding: int | None = None, terms: int = TERM) -> str:
    """The start of a kernel's mangled name: zo::kernels::axpy_kernel<Direction 0, Rounding 0, Sum 0>."""
    arguments = f"LNS_9DirectionE{direction}E"
    if rounding is not None:
        arguments += f"LNS_8RoundingE{rounding}ELNS0_3SumE{terms}E"
    stem = f"{verb}_kernel"
    return f"_ZN2zo7kernels{len(stem)}{stem}" + ("" if verb == "philox" else f"I{arguments}E")


def update_symbol(direction: int, rule: int, rounding: int, kind: str = "") -> str:
    """The same of csrc/update.cu; kind 'scaled_': with factors of z."""
    stem = f"{kind}update_kernel"
    arguments = f"LNS_9DirectionE{direction}ELNS_4RuleE{rule}ELNS_8RoundingE{rounding}E"
    return f"_ZN2zo7updates{len(stem)}{stem}I{arguments}"


# bfloat16 terms that lowrank.cu splits a float32 factor into, by the type of theta and the rank
SPLITS = {0: {16: 3, 32: 3, 64: 3, 128: 2}, 1: {16: 2, 32: 2, 64: 1, 128: 1}}
SPLITS[2] = SPLITS[1]


def lowrank_symbol(kind: int, rank: int, simple: bool = True, whole: bool = True) -> str:
    """The same of csrc/lowrank.cu."""
    arguments = f"ILi{rank // 16}ELi{SPLITS[kind][rank]}ELNS_4TypeE{kind}ELb{simple:d}ELb{whole:d}E"
    return f"_ZN2zo8products14lowrank_kernel{arguments}"


def strip_loop(function: Function) -> list[Instruction]:
    """The loop of lowrank.cu over the strips of a tile: the innermost one with matrix products."""
    for body in function.loops():
        if any(i.name.startswith("HMMA") for i in body):
            return body
    raise LookupError(f"{function.name}: no loop with matrix products")


def kernel(functions: dict[str, Function], prefix: str) -> Function:
    found = [f for name, f in functions.items() if name.startswith(prefix)]
    if len(found) != 1:
        raise LookupError(f"{prefix}: {len(found)} kernels in {sorted(functions)}")
    return found[0]
