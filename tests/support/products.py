"""triton_kernels/linear.py as machine code: compiled without a device, as the backend launches it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import sass
import triton
from triton.backends.compiler import GPUTarget

from zokern.backends import triton_linear

POINTERS = {0: "*fp32", 1: "*bf16", 2: "*fp16"}
TYPES = {
    "parts": "*fp32", "bias": "*fp32", "first": "*fp32", "middles": "*fp32", "last": "*fp32", "table": "*i64",
    "number": "i64", "shrink": "fp32", "keys": ("i32",) * 20,
}  # fmt: skip
UNITS = {"80": "HMMA", "86": "HMMA", "89": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "120": "HMMA"}
WIDE = "IMAD.WIDE.U32"
BOTH_SIGNS = dict(TYPE=1, DIRECTION=0, SIDES=2, TRANSPOSED=False, UNIT=True, RANK=0, R=16)


class Compiled(NamedTuple):
    text: str  # PTX
    function: sass.Function
    loop: list[sass.Instruction]  # over tiles
    weights: int  # of a thread in a turn of the loop
    shared: int

    def philox_blocks(self) -> float:
        """Philox blocks for each unit of eight weights.

        A block has 18 to 20 products of 32 bits to 64, by what is the same for a whole tensor."""
        return sum(i.name == WIDE for i in self.loop) / (self.weights / 8) / 18


def made(
    directory: Path, arch: str, given: dict[str, Any], module: ModuleType = triton_linear.kernels
) -> Compiled:
    """`product` with these constants beside those of both signs."""
    kernel, chosen = module.product, BOTH_SIGNS | given
    tile = triton_linear.tile_of(
        chosen["TYPE"], chosen["R"], chosen["RANK"], chosen["DIRECTION"] >= 0, chosen["UNIT"]
    )
    assert tile.rows == chosen["R"]
    blocks = dict(BM=triton_linear.ROWS, BK=tile.columns)
    constants = dict(BIAS=True, PARTS=True, EXACT=False, clock=None, **blocks) | chosen
    types = {a: TYPES.get(a, "i32") for a in kernel.arg_names} | dict.fromkeys(
        ("x", "weight", "y"), POINTERS[chosen["TYPE"]]
    )
    signature = {a: "constexpr" if a in constants else types[a] for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if types[a][0] == "*"}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    stages = triton_linear.STAGES if chosen["DIRECTION"] < 0 else 1
    options = {"num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": False}
    found = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)
    cubin = directory / f"{len(list(directory.iterdir()))}.cubin"
    cubin.write_bytes(found.asm["cubin"])
    function = next(iter(sass.disassemble(cubin).values()))
    unit = "FFMA" if chosen["TYPE"] == 0 else UNITS[arch]
    weights = triton_linear.ROWS * tile.columns // (32 * tile.warps)
    # code that waits for the matrix units of sm_100 jumps back too, without z
    least = 0 if chosen["DIRECTION"] < 0 else 16 * weights / 8
    loop = next(
        body
        for body in function.loops()
        if sum(i.name == WIDE for i in body) >= least and sum(i.name.startswith(unit) for i in body) >= 4
    )
    return Compiled(found.asm["ptx"], function, loop, weights, found.metadata.shared)
