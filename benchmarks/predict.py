"""What the machine code says the GPU kernels should take, per 1e9 weights: `python -m benchmarks.predict`.
Needs nvcc, no GPU. It ends with whole steps (predict_step.py), and writes benchmarks/results/predicted.md;
`--steps` prints those alone, for one device.

Every figure is predicted from the machine code of the present tree, not measured. The model, per
multiprocessor quarter (it issues one warp instruction a clock; 32 lanes at 16, 8 or 4 a clock take 2, 4 or 8
clocks of a pipe):

    pipe    instructions                                   clocks of a warp instruction
    issue   all                                            1
    alu     LOP3 IADD3 SHF PRMT LEA ISETP SEL I2FP F2FP    2
    heavy   IMAD                                           2      (IMAD.WIDE, IMAD.HI: 4)
    fma     FFMA FMUL FADD HFMA2                           2 on one of two pipes, `heavy` being one of them;
            on sm_80 there is one
    xu      MUFU POPC FLO F2I I2F; FCHK by assumption      8
    mma     HMMA.16816                                     8, 16 or 32, by device
            HGMMA.64xN: as N / 8 of these; the matrix units of sm_100 work beside the pipes: left out
    compute = max(issue, alu, heavy, (heavy + fma) / pipes, xu, mma) / (4 quarters * multiprocessors * clock)
    memory  = bytes that must move / bandwidth of a copy
    time    = max(compute, memory)

The pipes' rates are the stall counts that ptxas writes between independent instructions of one warp; that of
the matrix unit follows from the dense 16-bit peak in the data sheet, half of it for H200, H100 and B200,
where single-warp products do not reach the peak. Latency, launch and the tail of the last wave are not in the
model: a kernel with enough loads in flight should come within some 5 % of it, no kernel beats it.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
import sass  # noqa: E402  tests/support/sass.py reads machine code

UNIT = 8  # elements of one turn of a loop
WEIGHTS = 1e9
DRAWS = 8

# Mnemonics by pipe, matched from the start; the first match counts. `other` takes an issue slot and a pipe
# that is never full here.
PIPES = {
    "wide": r"IMAD\.(WIDE|HI)",
    "heavy": r"IMAD|IDP",
    "mma": r"HMMA\.16816|HGMMA\.64x",
    "xu": r"MUFU|FCHK|POPC|FLO|F2I|I2F\b|I2F\.",
    "fma": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2",
    "alu": r"LOP3|IADD|VIADD|SHF|PRMT|LEA|ISETP|FSETP|SEL|FSEL|I2FP|F2FP|MOV|FMNMX|IMNMX|VIMNMX|SGXT|IABS"
    r"|PLOP3|R2P|P2R|CS2R|BMSK",
    "other": r"U[A-Z]|R2UR|S2R|S2UR|LD|ST|ATOM|RED|BAR|BRA|BRX|BSSY|BSYNC|BREAK|EXIT|NOP|WARPSYNC|CALL|RET"
    r"|SHFL|ELECT|ACQBULK|VOTE|ERRBAR|DEPBAR|ENDCOLLECTIVE|MEMBAR|NANOSLEEP|YIELD|BMOV|CCTL|WARPGROUP|FENCE"
    r"|SYNCS",
}
CLOCKS = {"wide": 4, "heavy": 2, "xu": 8, "fma": 2, "alu": 2}


def pipe_of(name: str) -> str:
    for pipe, pattern in PIPES.items():
        if re.match(pattern, name):
            return pipe
    raise LookupError(
        f"instruction {name} is in no pipe of the model; add it to PIPES in benchmarks/predict.py"
    )


@dataclass(frozen=True)
class Device:
    name: str
    arch: str
    multiprocessors: int
    clock: float  # GHz under load
    bandwidth: float  # TB/s of a copy: measured on H200 and H100, about 90 % of the peak elsewhere
    mma: int  # clocks of a quarter for a warp's m16n8k16 in 16 bits with float32 sums

    @property
    def fma_pipes(self) -> int:
        return 1 if self.arch == "80" else 2

    def budget(self, bytes_per_element: float) -> float:
        """Instructions per element that the memory floor leaves time for."""
        return 4 * 32 * self.multiprocessors * self.clock * bytes_per_element / (self.bandwidth * 1e3)


DEVICES = (
    Device("H200", "90", 132, 1.755, 4.3, 8),
    Device("H100", "90", 132, 1.755, 3.0, 8),
    Device("A100", "80", 108, 1.41, 1.75, 8),
    Device("B200", "100", 148, 1.85, 7.2, 8),
    Device("L40S", "89", 142, 2.52, 0.82, 16),
    Device("RTX 4090", "89", 128, 2.52, 0.93, 32),
    Device("RTX 5090", "120", 170, 2.41, 1.6, 32),
)


@dataclass
class Work:
    """Instructions by pipe for each element."""

    pipes: Counter[str]

    @classmethod
    def of(cls, *loops: tuple[Iterable[sass.Instruction], float]) -> Work:
        """Instructions and how often each of them is issued per element, for one thread."""
        pipes: Counter[str] = Counter()
        for code, often in loops:
            for instruction in code:
                pipes[pipe_of(instruction.name)] += often
                if columns := re.match(r"HGMMA\.64x(\d+)x", instruction.name):
                    pipes["more products"] += often * (int(columns[1]) / 8 - 1)
        return cls(pipes)

    @property
    def instructions(self) -> float:
        return sum(self.pipes.values()) - self.pipes["more products"]

    def clocks(self, device: Device) -> dict[str, float]:
        """Clocks of a quarter for each warp of elements, by what could be the limit."""
        busy = {pipe: self.pipes[pipe] * clocks for pipe, clocks in CLOCKS.items()}
        heavy = busy["wide"] + busy["heavy"]
        fma = (heavy + busy["fma"]) / device.fma_pipes
        mma = (self.pipes["mma"] + self.pipes["more products"]) * device.mma
        return {
            "issue": self.instructions,
            "alu": busy["alu"],
            "heavy": heavy,
            "fma": fma,
            "xu": busy["xu"],
            "mma": mma,
        }

    def milliseconds(self, device: Device) -> tuple[float, str]:
        """Time per 1e9 elements, and what limits it."""
        clocks = self.clocks(device)
        limit = max(clocks, key=lambda pipe: clocks[pipe])
        return clocks[limit] * WEIGHTS / (4 * 32 * device.multiprocessors * device.clock * 1e9) * 1e3, limit


def without(outer: list[sass.Instruction], inner: list[sass.Instruction]) -> list[sass.Instruction]:
    return [i for i in outer if not inner[0].address <= i.address <= inner[-1].address]


def loop_work(function: sass.Function, loads: int, stores: int, longer: int = 0) -> Work:
    """A loop over units."""
    return Work.of((sass.vector_loop(function, loads, stores, longer), 1 / UNIT))


def tile_work(function: sass.Function, loads: int, stores: int) -> Work:
    outer, inner = sass.tile(function, loads, stores)
    return Work.of((inner, 1 / UNIT / 4), (without(outer, inner), 1 / UNIT / 16))


@dataclass(frozen=True)
class Case:
    name: str
    traffic: int  # bytes per element that must move
    verb: str
    direction: int
    loads: int
    stores: int
    rounding: int = 0
    terms: int = sass.TERM
    draws: int = 0  # of TERMS, one sum, and of STEPS
    longer: int = 0  # loops of another type with the same accesses, all of them shorter

    def work(self, functions: dict[str, sass.Function]) -> Work:
        rounding = self.rounding if self.verb == "axpy" else None
        function = sass.kernel(functions, sass.symbol(self.verb, self.direction, rounding, self.terms))
        if self.direction == 1:
            return tile_work(function, self.loads, self.stores)
        if self.terms in (sass.TERMS, sass.STEPS):
            return Work.of(*sass.many(function, self.loads).instructions(self.draws))
        return loop_work(function, self.loads, self.stores, self.longer)


CASES = (
    Case("axpy_ normal, 16 bits", 4, "axpy", 0, 1, 1),
    Case("axpy_ normal, float32", 8, "axpy", 0, 2, 2),
    Case("axpy_ normal stochastic, bf16", 4, "axpy", 0, 1, 1, 1),
    Case("axpy_ normal residual, bf16", 8, "axpy", 0, 2, 2, 2, longer=1),
    Case("axpy_ normal with decay, 16 bits", 4, "axpy", 0, 1, 1, terms=sass.DECAYED_TERM),
    Case(f"axpy_ normal K={DRAWS}, 16 bits", 4, "axpy", 0, 1, 1, 0, sass.TERMS, DRAWS),
    Case(f"axpy_ normal replay of {DRAWS} steps, 16 bits", 4, "axpy", 0, 1, 1, 0, sass.STEPS, DRAWS),
    Case(f"axpy_ normal replay of {DRAWS} steps, stochastic", 4, "axpy", 0, 1, 1, 1, sass.STEPS, DRAWS),
    Case("axpy_ rademacher, 16 bits", 4, "axpy", 1, 1, 1),
    Case("axpy_ rademacher, float32", 8, "axpy", 1, 2, 2),
    Case("perturb both signs normal, 16 bits", 6, "perturb", 0, 1, 2),
    Case("perturb both signs normal, float32", 12, "perturb", 0, 2, 4),
    Case("perturb both signs rademacher, 16 bits", 6, "perturb", 1, 1, 2),
    Case("draw normal, 16 bits", 2, "draw", 0, 0, 1),
    Case("draw normal, float32", 4, "draw", 0, 0, 2),
)


@dataclass(frozen=True)
class UpdateCase:
    """A loop of csrc/update.cu, one term. Adam's has the calls in it that only operands at the ends of the
    range take."""

    name: str
    traffic: int
    direction: int
    rule: int
    accesses: int  # 16-byte loads, and as many stores
    rounding: int = 0

    def work(self, functions: dict[str, sass.Function]) -> Work:
        function = sass.kernel(functions, sass.update_symbol(self.direction, self.rule, self.rounding))
        return loop_work(function, self.accesses, self.accesses)


UPDATES = (
    UpdateCase("update_ momentum normal, 16 bits", 12, 0, 0, 3),
    UpdateCase("update_ momentum normal, float32", 16, 0, 0, 4),
    UpdateCase("update_ momentum normal stochastic, bf16", 12, 0, 0, 3, 1),
    UpdateCase("update_ adam normal, 16 bits", 20, 0, 1, 5),
    UpdateCase("update_ adam normal, float32", 24, 0, 1, 6),
    UpdateCase("update_ adam rademacher, 16 bits", 20, 1, 1, 5),
)


@dataclass(frozen=True)
class ProductCase:
    """The loop of csrc/lowrank.cu over strips, of a matrix whose shape is whole tiles; factors come from the
    caches."""

    name: str
    traffic: int
    kind: int  # of theta: 0 float32, 1 bfloat16
    rank: int

    def work(self, functions: dict[str, sass.Function]) -> Work:
        loop = sass.strip_loop(sass.kernel(functions, sass.lowrank_symbol(self.kind, self.rank)))
        return Work.of((loop, 1 / 16))  # eight columns of two rows a lane


PRODUCTS = tuple(
    ProductCase(f"lowrank_ rank {rank}, {name}", traffic, kind, rank)
    for kind, name, traffic in ((1, "bf16", 4), (0, "float32", 8))
    for rank in (16, 32, 64, 128)
)


@dataclass(frozen=True)
class FusedCase:
    """The loop of triton_kernels/linear.py over tiles, both signs, bfloat16: W is read once, y is small."""

    rows: int  # of a side
    direction: int = 0
    traffic: int = 2

    @property
    def name(self) -> str:
        return f"linear both signs {('normal', 'signs')[self.direction]}, {self.rows} rows a side, bf16"

    def work(self, works: dict[str, Work]) -> Work:
        return works[self.name]


FUSED = (FusedCase(16), FusedCase(32), FusedCase(64), FusedCase(128), FusedCase(16, 1))


def fused_work(folder: Path) -> dict[str, dict[str, Work]]:
    """The work of FUSED by architecture, compiled here."""
    import products  # which needs Triton

    found: dict[str, dict[str, Work]] = {device.arch: {} for device in DEVICES}
    for arch, works in found.items():
        for case in FUSED:
            made = products.made(folder, arch, {"R": case.rows, "DIRECTION": case.direction})
            works[case.name] = Work.of((made.loop, 1 / made.weights))
    return found


# csrc/*.cu by the namespace of their kernels
SOURCES = {"kernels": ("elementwise", "axpy"), "updates": ("update",), "products": ("lowrank",)}


def code_of_the_tree(architectures: Sequence[str]) -> dict[str, dict[str, sass.Function]]:
    """Every kernel by architecture: from the built module where it is newer than the sources, compiled
    otherwise."""
    code: dict[str, dict[str, sass.Function]] = {}
    for namespace, stems in SOURCES.items():
        for arch, functions in sass.machine_code(
            tuple(sass.CSRC / f"{stem}.cu" for stem in stems), namespace, architectures
        ).items():
            code.setdefault(arch, {}).update(functions)
    return code


def table(
    code: dict[str, dict[str, Any]],
    devices: Iterable[Device] = DEVICES,
    cases: Iterable[Case | UpdateCase | ProductCase | FusedCase] = CASES,
) -> list[str]:
    lines = []
    for device in devices:
        lines += [
            "",
            f"{device.name}: sm_{device.arch}, {device.multiprocessors} multiprocessors at {device.clock} "
            "GHz, copy "
            f"{device.bandwidth} TB/s; {device.budget(4):.1f} instructions per element fit under the floor "
            "of 4 B",
            f"{'predicted, not measured; ms per 1e9 weights':44} {'B/el':>4} {'instr/el':>8} {'compute':>8} "
            f"{'floor':>6} {'time':>6} "
            f"{'of floor':>8}  limit",
        ]
        for case in cases:
            work = case.work(code[device.arch])
            compute, limit = work.milliseconds(device)
            floor = case.traffic * WEIGHTS / (device.bandwidth * 1e12) * 1e3
            time = max(compute, floor)
            lines.append(
                f"{case.name:44} {case.traffic:4} {work.instructions:8.2f} {compute:8.3f} {floor:6.3f} "
                f"{time:6.3f} "
                f"{100 * floor / time:7.0f}%  {'memory' if floor >= compute else limit}"
            )
    return lines


def main() -> None:
    if (reason := sass.missing()) is not None:
        raise SystemExit(f"benchmarks.predict reads machine code: {reason}")
    from . import predict_page, predict_step

    device = DEVICES[0]
    code = code_of_the_tree((device.arch,) if "--steps" in sys.argv[1:] else sass.ARCHITECTURES)
    if len(code) > 1:
        print("\n".join(table(code, cases=[*CASES, *UPDATES, *PRODUCTS])))
        if importlib.util.find_spec("triton") is None:
            raise SystemExit("linear is a Triton kernel: install triton to have it predicted")
        with TemporaryDirectory() as folder:
            print("\n".join(table(fused_work(Path(folder)), cases=FUSED)))
    works = {case.name: case.work(code[device.arch]) for case in (*CASES, *PRODUCTS)}
    rows, parts = predict_step.rows(works, device)
    predict_page.write(rows, parts, works, device)
    print("\n" + predict_page.page(rows, parts, device))


if __name__ == "__main__":
    main()
