"""Run one kernel of a PTX text on NumPy arrays:
every thread of the grid at once, and every rounding as PTX defines it.

    run(text, kernel, grid, block, arguments, memory=())

text       PTX, of nvcc (`-ptx`) or Triton (`compiled.asm["ptx"]`)
kernel     the entry's name, or a prefix that only one entry has; None when there is one entry
grid       blocks: an integer or (x, y, z); block: threads per block, likewise
arguments  one per .param: a NumPy array (its address is passed), a Python or NumPy scalar, or bytes (a struct
           passed by value). Trailing parameters that are not given
           are null pointers (Triton appends scratch pointers).
memory     more arrays that the kernel may touch, for example those that a table holds pointers to
Returns the number of instructions executed by the warp-wide scheduler, by opcode (a Counter).

Addresses are real. An access outside the given arrays, or not aligned to its width, raises MemoryError and
names the instruction; so neighbours of a tensor need no red zone. An unknown opcode or modifier raises
NotImplementedError: nothing is skipped. Float operations without an explicit rounding are refused, because
ptxas may contract them, and so is .ftz.

Threads keep a program counter each; the smallest one runs next, so threads that diverge meet again. bar.sync
waits for the threads of the block that have not exited, bar.warp.sync (of whole warps) for those of the warp.
Shared memory is one array per block; local memory and calls are not supported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
UNSIGNED = {8: U8, 16: U16, 32: U32, 64: U64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
# from here on, for 2^20 bytes, addresses are a block's shared memory: compilers keep those in 32 bits
SHARED = 0x7FF00000


# float32, bit patterns in and out


def f32(bits: Any) -> Any:
    return np.asarray(bits, U32).view(np.float32)


def bits(value: Any) -> Any:
    return np.asarray(value, np.float32).view(U32)


def fma(a: Any, b: Any, c: Any) -> Any:
    """round(a b + c), rounded once: exact product in float64, sum rounded to odd there, then cut to float32.
    A NaN is the GPU's."""
    product, c = f32(a).astype(np.float64) * f32(b).astype(np.float64), f32(c).astype(np.float64)
    total = np.asarray(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    word = total.view(np.int64)
    inexact_even = (error != 0) & (word & 1 == 0) & np.isfinite(total)
    odd = np.where(inexact_even, np.where((error < 0) == (total > 0), word - 1, word + 1), word)
    result = odd.view(np.float64).astype(np.float32)
    return np.where(np.isnan(result), U32(0x7FFFFFFF), bits(result))


def to_bf16(word: Any) -> Any:
    word = np.asarray(word, U32)
    wide = word.astype(U64)
    rounded = ((wide + 0x7FFF + (wide >> U64(16) & U64(1))) >> U64(16)).astype(U16)
    return np.where((word & U32(0x7FFFFFFF)) > 0x7F800000, U16(0x7FFF), rounded)


def to_f16(word: Any) -> Any:
    value = f32(word)
    return np.where(np.isnan(value), U16(0x7FFF), value.astype(np.float16).view(U16))


def halves(word: Any) -> tuple[Any, Any]:
    word = np.asarray(word, U32)
    return (word & U32(0xFFFF)).astype(U16), (word >> U32(16)).astype(U16)


def join(low: Any, high: Any) -> Any:
    return np.asarray(low).astype(U32) | np.asarray(high).astype(U32) << U32(16)


def watch(kind: str) -> Callable:
    """fma.rn.{bf16x2,f16x2} where a factor is zero, which is how axpy.cu uses it: NaN or the addend."""
    infinity = U16(0x7F80 if kind == "bf16x2" else 0x7C00)

    def one(a, b, c):
        if np.any((b & U16(0x7FFF)) != 0):
            raise NotImplementedError(f"fma.rn.{kind} with a second factor other than zero")
        nan = ((a & infinity) == infinity) | ((c & U16(0x7FFF)) > infinity)
        return np.where(nan, U16(0x7FFF), c)

    def both(a, b, c):
        return join(*(one(*parts) for parts in zip(halves(a), halves(b), halves(c))))

    return both


def packed(single: Callable) -> Callable:
    """Two float32 in 64 bits."""

    def both(*words):
        low = single(*(np.asarray(w, U64).astype(U32) for w in words)).astype(U64)
        high = single(*((np.asarray(w, U64) >> U64(32)).astype(U32) for w in words)).astype(U64)
        return low | high << U64(32)

    return both


# The text


@dataclass
class Instruction:
    text: str
    op: str
    operands: list[Any]  # str, or a list of str for {a, b}
    guard: str | None
    inverted: bool


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, int]]  # name, bytes
    registers: dict[str, str]
    code: list[Instruction]
    labels: dict[str, int]
    shared: dict[str, int]
    shared_bytes: int


def operands(text: str) -> list[Any]:
    found: list[Any] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
        part = part.strip()
        found.append([p.strip() for p in part[1:-1].split(",")] if part.startswith("{") else part)
    return found


@cache
def size(kind: str) -> int:
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind.split("x")[0])) // 8


@lru_cache(8)  # a text is megabytes, and has many kernels
def split(text: str) -> tuple[str, list[re.Match[str]]]:
    """The text without comments, and where its kernels begin."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    return text, list(re.finditer(r"\.entry\s+([\w$.]+)\s*\(", text))


@lru_cache(64)  # a kernel is launched many times
def parse(text: str, name: str | None) -> Kernel:
    text, entries = split(text)
    entries = [m for m in entries if name is None or m[1].startswith(name)]
    exact = [m for m in entries if m[1] == name]
    entries = exact or entries
    if len(entries) != 1:
        raise LookupError(f"{name}: {len(entries)} entries match")
    start = text.index("{", entries[0].end())
    head = text[entries[0].end() : start]
    parameters = []
    for part in head[: head.rindex(")")].split(","):
        if found := re.search(r"\.([usbf]\d+)\b.*?([\w$]+)(?:\[(\d+)\])?\s*$", part.strip(), re.S):
            parameters.append((found[2], size(found[1]) * int(found[3] or 1)))
    depth, end = 1, start + 1
    for brace in re.compile("[{}]").finditer(text, end):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            end = brace.start()
            break
    body = text[start + 1 : end]
    registers, code, labels, shared, used = {}, [], {}, {}, 0
    for found in re.finditer(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?", text):
        align = int(found[1] or 4)
        used = -(-used // align) * align
        shared[found[3]] = SHARED + used
        used += size(found[2]) * int(found[4] or 0)
    position = 0
    while position < len(body):
        # blanks, and the braces of a scope
        if found := re.compile(r"\s+|[{}](?=\s|\.)|\}").match(body, position):
            position = found.end()
            continue
        if found := re.compile(r"([\w$]+):").match(body, position):
            labels[found[1]] = len(code)
            position = found.end()
            continue
        stop = body.index(";", position)
        statement = " ".join(body[position:stop].split())
        position = stop + 1
        if statement.startswith(".reg"):
            kind, rest = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
            for one in rest.split(","):
                if several := re.match(r"\s*([%\w$]+)<(\d+)>", one):
                    registers.update({f"{several[1]}{i}": kind for i in range(int(several[2]))})
                else:
                    registers[one.strip()] = kind
        elif statement.startswith((".pragma", ".shared")):
            continue
        elif statement.startswith("."):
            raise NotImplementedError(statement)
        else:
            found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement)
            code.append(Instruction(statement, found[3], operands(found[4]), found[2], found[1] == "!"))
    return Kernel(entries[0][1], parameters, registers, code, labels, shared, used)


# What an instruction computes: operation and type to a function of unsigned bit patterns

COMPARE: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def as_type(kind: str, value: Any) -> Any:
    """Bit pattern as the numbers that `kind` names."""
    if kind == "pred":
        return np.asarray(value, bool)
    width = size(kind) * 8
    value = np.asarray(value).astype(UNSIGNED[width])
    if kind[0] == "s":
        return value.view(SIGNED[width])
    if kind[0] == "f" and kind != "f64":
        return value.view({16: np.float16, 32: np.float32}[width])
    return value


def unsigned(value: Any, width: int) -> Any:
    value = np.asarray(value)
    return (
        value.view(UNSIGNED[value.dtype.itemsize * 8]).astype(UNSIGNED[width])
        if value.dtype.kind != "b"
        else value
    )


def wide(kind: str, value: Any) -> Any:
    """The same number in twice the bits (64 stays, as Python integers)."""
    number = as_type(kind, value)
    width = size(kind) * 16
    if width > 64:
        return number.astype(object)
    return number.astype((SIGNED if kind[0] == "s" else UNSIGNED)[width])


def compute(op: str) -> tuple[Callable, str, list[str]]:
    """The function of an arithmetic opcode, the type of its result,
    and the types of its sources (the last one repeats)."""
    parts = op.split(".")
    base, mods, kind = parts[0], parts[1:-1], parts[-1]
    is_float = kind in ("f32", "f64", "f16", "bf16", "f32x2", "bf16x2", "f16x2", "f16x2")
    if base == "cvt":
        return convert(op, mods, kind)
    if is_float and base in ("add", "sub", "mul", "fma", "div", "sqrt"):
        if mods != ["rn"]:
            raise NotImplementedError(
                f"{op}: a float operation must say .rn and nothing else, or ptxas may contract or flush it"
            )
        single = {
            "add": lambda a, b: bits(f32(a) + f32(b)), "sub": lambda a, b: bits(f32(a) - f32(b)),
            "mul": lambda a, b: bits(f32(a) * f32(b)), "fma": fma,
            "div": lambda a, b: bits(f32(a) / f32(b)), "sqrt": lambda a: bits(np.sqrt(f32(a))),
        }[base]  # fmt: skip
        if kind == "f32":
            return single, "b32", ["b32"]
        if kind == "f32x2" and base not in ("div", "sqrt"):
            return packed(single), "b64", ["b64"]
        if base == "fma" and kind in ("bf16x2", "f16x2"):
            return watch(kind), "b32", ["b32"]
        raise NotImplementedError(op)
    if base in ("neg", "abs") and kind == "f32" and not mods:
        sign = U32(0x80000000)
        return (lambda a: a ^ sign) if base == "neg" else (lambda a: a & ~sign), "b32", ["b32"]
    if base == "setp":
        compare = mods[0]
        if is_float:
            if kind != "f32" or len(mods) != 1:
                raise NotImplementedError(op)
            if compare in ("nan", "num"):  # whether either operand is a NaN, or neither

                def is_nan(a, b):
                    return (np.isnan(f32(a)) | np.isnan(f32(b))) == (compare == "nan")

                return is_nan, "pred", ["b32"]
            loose = compare.endswith("u") and compare[:-1] in COMPARE
            test = COMPARE[compare[:-1] if loose else compare]

            def ordered(a, b):
                a, b = f32(a), f32(b)
                nan = np.isnan(a) | np.isnan(b)
                return test(a, b) | nan if loose else test(a, b) & ~nan

            return ordered, "pred", ["b32"]
        test = COMPARE[compare]
        if len(mods) == 1:
            return lambda a, b: test(as_type(kind, a), as_type(kind, b)), "pred", [kind]
        join_with = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[mods[1]]
        return (
            lambda a, b, p: join_with(test(as_type(kind, a), as_type(kind, b)), p),
            "pred",
            [kind, kind, "pred"],
        )
    if base == "selp" and not mods:
        return lambda a, b, p: np.where(p, a, b), "b" + str(size(kind) * 8), [kind, kind, "pred"]
    if is_float:
        raise NotImplementedError(op)
    if kind == "pred":
        table = {
            "and": np.logical_and,
            "or": np.logical_or,
            "xor": np.logical_xor,
            "not": np.logical_not,
            "mov": np.array,
        }
        return table[base], "pred", ["pred"]
    width = size(kind) * 8
    unsigned_type, same = UNSIGNED[width], f"b{width}"
    mask = unsigned_type(2**width - 1)

    def shift(function):
        """PTX clamps the amount; the amount is a 32-bit value whatever the type."""

        def clamped(a, n):
            n = np.asarray(n).astype(np.int64)
            a = as_type(kind, a)
            full = np.minimum(n, width - 1)
            moved = unsigned(function(a, full.astype(a.dtype)), width)
            fill = np.where(a < 0, mask, unsigned_type(0)) if function is np.right_shift else unsigned_type(0)
            return np.where(n >= width, fill, moved)

        return clamped

    if base in ("and", "or", "xor", "not") and not mods:
        table = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}
        return table[base], same, [same]
    if base in ("shl", "shr") and not mods:
        return shift(np.left_shift if base == "shl" else np.right_shift), same, [same, "b32"]
    if base in ("add", "sub") and not mods:
        return (np.add if base == "add" else np.subtract), same, [same]
    if base == "neg" and not mods:
        return lambda a: unsigned_type(0) - a, same, [same]
    if base == "abs" and not mods:
        return lambda a: unsigned(np.abs(as_type(kind, a)), width), same, [same]
    if base in ("min", "max") and not mods:
        function = np.minimum if base == "min" else np.maximum
        return lambda a, b: unsigned(function(as_type(kind, a), as_type(kind, b)), width), same, [same]
    if base in ("mul", "mad") and mods in (["lo"], ["hi"], ["wide"]):
        if mods == ["lo"]:
            return (
                (lambda a, b, c=0: a * b + unsigned_type(c))
                if base == "mul"
                else (lambda a, b, c: a * b + c),
                same,
                [same],
            )
        if mods == ["wide"]:
            double = f"b{2 * width}"

            def product(a, b, c=0):
                return unsigned(wide(kind, a) * wide(kind, b), 2 * width) + UNSIGNED[2 * width](c)

            def product_sum(a, b, c):
                return unsigned(wide(kind, a) * wide(kind, b), 2 * width) + c

            return (product if base == "mul" else product_sum), double, [same, same, double]

        def high(a, b):
            double = wide(kind, a) * wide(kind, b)
            if width == 64:
                return np.array([int(x) >> 64 & (2**64 - 1) for x in np.atleast_1d(double)], dtype=U64)
            return unsigned(double >> width, width)

        return high if base == "mul" else (lambda a, b, c: high(a, b) + c), same, [same]
    if base in ("div", "rem") and not mods:

        def divide(a, b):
            a, b = as_type(kind, a), as_type(kind, b)
            quotient = (
                np.where((a < 0) ^ (b < 0), -(np.abs(a) // np.abs(b)), np.abs(a) // np.abs(b))
                if kind[0] == "s"
                else a // b
            )
            return unsigned(quotient if base == "div" else a - quotient * b, width)

        return divide, same, [same]
    if base == "bfe":

        def extract(a, position, length):
            a = as_type("u" + kind[1:], a).astype(U64)
            position, length = np.asarray(position) & U32(0xFF), np.asarray(length) & U32(0xFF)
            if np.any(position + length > width) or np.any(length == 0):
                raise NotImplementedError(f"{op} empty or past the end")
            field = a >> position.astype(U64) & ((U64(1) << length.astype(U64)) - U64(1))
            sign = U64(1) << (length.astype(U64) - U64(1))
            return ((field ^ sign) - sign if kind[0] == "s" else field).astype(unsigned_type)

        return extract, same, [same, "b32", "b32"]
    if base == "bfi":

        def insert(a, b, position, length):
            position, length = (np.asarray(x).astype(U64) & U64(0xFF) for x in (position, length))
            if np.any(position + length > width) or np.any(length >= 64):
                raise NotImplementedError(f"{op} past the end")
            field = ((U64(1) << length) - U64(1)) << position
            return (
                (np.asarray(b).astype(U64) & ~field) | (np.asarray(a).astype(U64) << position & field)
            ).astype(unsigned_type)

        return insert, same, [same, same, "b32", "b32"]
    if base == "lop3":

        def logic(a, b, c, table):
            number = int(np.atleast_1d(table)[0])
            value = np.zeros_like(np.asarray(a) | b | c)
            for i in range(8):
                if number >> i & 1:
                    value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            return value

        return logic, same, [same]
    if base == "prmt" and not mods:

        def permute(a, b, selector):
            both = np.asarray(a).astype(U64) | np.asarray(b).astype(U64) << U64(32)
            selector = np.asarray(selector).astype(U64)
            value = np.zeros_like(both)
            for i in range(4):
                nibble = selector >> U64(4 * i) & U64(15)
                byte = both >> (nibble & U64(7)) * U64(8) & U64(0xFF)
                sign = np.where(byte & U64(0x80), U64(0xFF), U64(0))
                value |= np.where(nibble & U64(8), sign, byte) << U64(8 * i)
            return value.astype(U32)

        return permute, same, [same]
    if base == "shf":
        right, wrap = mods[0] == "r", mods[1] == "wrap"

        def funnel(low, high, n):
            n = np.asarray(n).astype(U64)
            n = n & U64(31) if wrap else np.minimum(n, U64(32))
            both = np.asarray(high).astype(U64) << U64(32) | np.asarray(low).astype(U64)
            return (both >> n if right else both << n >> U64(32)).astype(U32)

        return funnel, same, [same]
    if base in ("popc", "clz") and not mods:

        def count(a):
            a = np.atleast_1d(a)
            if base == "popc":
                return np.array([bin(int(x)).count("1") for x in a], dtype=U32)
            return np.array([width - int(x).bit_length() for x in a], dtype=U32)

        return count, "b32", [same]
    raise NotImplementedError(op)


def convert(op: str, mods: list[str], source: str) -> tuple[Callable, str, list[str]]:
    target, how = mods[-1], mods[:-1]
    if how == ["rn"] and source == "f32" and target in ("bf16x2", "f16x2"):
        cut = to_bf16 if target == "bf16x2" else to_f16
        return lambda a, b: join(cut(b), cut(a)), "b32", ["b32"]
    if how == ["rn"] and source == "f32" and target in ("bf16", "f16"):
        return (to_bf16 if target == "bf16" else to_f16), "b16", ["b32"]
    if how == [] and target == "f32" and source == "f16":
        return lambda a: bits(np.asarray(a, U16).view(np.float16).astype(np.float32)), "b32", ["b16"]
    if how == [] and target == "f32" and source == "bf16":
        return lambda a: np.asarray(a).astype(U32) << U32(16), "b32", ["b16"]
    if how == ["rn"] and target == "f32" and source in ("s32", "u32", "s64", "u64", "u16", "s16"):
        return lambda a: bits(as_type(source, a).astype(np.float32)), "b32", [source]
    if not how and source[0] in "us" and target[0] in "us":
        width = size(target) * 8
        number = SIGNED if source[0] == "s" else UNSIGNED

        def resize(a):
            return unsigned(
                as_type(source, a).astype(number[width] if width >= size(source) * 8 else UNSIGNED[width]),
                width,
            )

        return resize, f"b{width}", [source]
    raise NotImplementedError(op)


# The machine


class Memory:
    """The arrays of a launch by address, and shared memory."""

    def __init__(self, arrays: Sequence[np.ndarray], blocks: int, shared: int):
        arrays = list({a.ctypes.data: a for a in arrays if a.nbytes}.values())
        arrays.sort(key=lambda a: a.ctypes.data)
        for a in arrays:
            if not a.flags.c_contiguous:
                raise ValueError("memory: an array is not contiguous")
        self.bytes = [a.reshape(-1).view(U8) for a in arrays]
        self.starts = np.array([a.ctypes.data for a in arrays], dtype=np.int64)
        self.shared = np.zeros((blocks, shared), dtype=U8)

    def places(self, address: np.ndarray, width: int, block: np.ndarray, text: str):
        """(which threads, their bytes' buffer, offsets) for each buffer that is touched."""
        address = address.astype(np.int64)
        if np.any(address % width):
            raise MemoryError(
                f"{text}: address {hex(int(address[address % width != 0][0]))} is not aligned to {width}"
            )
        inside = (address >= SHARED) & (address < SHARED + (1 << 20))
        if inside.any():
            if not inside.all():
                raise NotImplementedError(f"{text}: shared and global addresses in one instruction")
            offset = address - SHARED
            if np.any(offset + width > self.shared.shape[1]):
                raise MemoryError(f"{text}: past the end of shared memory")
            yield slice(None), self.shared.reshape(-1), block * self.shared.shape[1] + offset
            return
        owner = np.searchsorted(self.starts, address, side="right") - 1
        for which in np.unique(owner):
            chosen = owner == which
            buffer = self.bytes[which]
            offset = address[chosen] - self.starts[which]
            if which < 0 or np.any(offset + width > len(buffer)):
                wrong = address[chosen][0 if which < 0 else int(np.argmax(offset + width > len(buffer)))]
                raise MemoryError(f"{text}: address {hex(int(wrong))} lies in none of the arrays")
            yield chosen, buffer, offset


def run(text: str, kernel: str | None, grid: Any, block: Any, arguments: Sequence[Any],
    memory: Sequence[np.ndarray] = (),
        shared: int = 0) -> Counter[str]:  # fmt: skip
    """Run a kernel; see the module's text. ``shared``: bytes of dynamic shared memory per block."""
    with np.errstate(all="ignore"):
        return _Machine(parse(text, kernel), grid, block, arguments, memory, shared).run()


class _Machine:
    def __init__(
        self,
        kernel: Kernel,
        grid: Any,
        block: Any,
        arguments: Sequence[Any],
        memory: Sequence[np.ndarray],
        shared: int,
    ):
        self.kernel = kernel
        grid, block = ((*((x,) if np.isscalar(x) else tuple(x)), 1, 1)[:3] for x in (grid, block))
        blocks, threads = int(np.prod(grid)), int(np.prod(block))
        number = np.arange(blocks * threads)
        inside, which = number % threads, number // threads
        self.block, self.lane, self.count = which, inside % 32, len(number)
        self.warp = which * -(-threads // 32) + inside // 32
        self.special = {"%laneid": self.lane.astype(U32), "%warpid": (inside // 32).astype(U32)}
        for name, index, shape in (("tid", inside, block), ("ctaid", which, grid)):
            for axis, value in zip(
                "xyz", (index % shape[0], index // shape[0] % shape[1], index // (shape[0] * shape[1]))
            ):
                self.special[f"%{name}.{axis}"] = value.astype(U32)
                self.special[f"%n{name}.{axis}"] = np.full(self.count, shape["xyz".index(axis)], U32)
        arrays = [a for a in arguments if isinstance(a, np.ndarray) and a.ndim] + list(memory)
        self.memory = Memory(arrays, blocks, kernel.shared_bytes + shared)
        self.parameters = {}
        for i, (name, width) in enumerate(kernel.parameters):
            self.parameters[name] = self.pack(arguments[i], width) if i < len(arguments) else bytes(width)
        self.registers = {
            name: np.zeros(self.count, bool if kind == "pred" else UNSIGNED[size(kind) * 8])
            for name, kind in kernel.registers.items()
        }
        self.computed: dict[str, tuple[Callable, str, list[str]]] = {}
        self.leaders = set(kernel.labels.values())
        self.executed: Counter[str] = Counter()

    @staticmethod
    def pack(argument: Any, width: int) -> bytes:
        if isinstance(argument, bytes):
            raw = argument
        elif isinstance(argument, np.ndarray) and argument.ndim:
            raw = int(argument.ctypes.data).to_bytes(8, "little")
        elif isinstance(argument, (float, np.floating)):
            raw = np.float32(argument).tobytes()
        else:
            raw = (int(argument) & (2 ** (8 * width) - 1)).to_bytes(width, "little")
        if len(raw) != width:
            raise ValueError(f"argument {argument!r} has {len(raw)} bytes; the parameter has {width}")
        return raw

    def get(self, operand: str, kind: str, who: Any) -> Any:
        if operand in self.registers:
            return self.registers[operand][who]
        if operand in self.special:
            return self.special[operand][who]
        if operand in self.kernel.shared:
            return np.full(self.count, self.kernel.shared[operand], UNSIGNED[size(kind) * 8])[who]
        negated = operand.startswith("!")
        if negated:
            return ~self.registers[operand[1:]][who]
        if operand.startswith(("0f", "0F")):
            return U32(int(operand[2:], 16))
        if kind == "pred":
            return np.bool_(int(operand, 0))
        width = size(kind) * 8
        return UNSIGNED[width](int(operand.rstrip("U"), 0) & (2**width - 1))

    def put(self, name: str, value: Any, who: Any) -> None:
        if name == "_":
            return
        target = self.registers[name]
        target[who] = np.asarray(value).astype(target.dtype)

    def address(self, operand: str, who: Any) -> np.ndarray:
        base, _, offset = operand[1:-1].replace(" ", "").partition("+")
        value = self.get(base, "u64", who).astype(U64)
        return np.broadcast_to(value + U64(int(offset or "0", 0) & (2**64 - 1)), self.block[who].shape)

    def run(self) -> Counter[str]:
        code, labels = self.kernel.code, self.kernel.labels
        pc = np.zeros(self.count, np.int64)
        done, waiting = len(code), np.zeros(self.count, bool)
        while True:
            ready = (pc < done) & ~waiting
            if not ready.any():
                if not waiting.any():
                    return self.executed
                raise RuntimeError("deadlock: threads wait at a barrier that others never reach")
            here = int(pc[ready].min())
            who: Any = np.nonzero(ready & (pc == here))[0]
            everyone = len(who) == self.count
            while True:  # one basic block
                instruction = code[here]
                op = instruction.op.split(".")[0]
                self.executed[instruction.op] += 1
                chosen = slice(None) if everyone else who
                active = None
                if instruction.guard is not None:
                    active = self.registers[instruction.guard][chosen] != instruction.inverted
                if op in ("bra", "ret", "exit"):
                    target = labels[instruction.operands[0]] if op == "bra" else done
                    pc[who] = target if active is None else np.where(active, target, here + 1)
                    break
                if op in ("bar", "barrier"):
                    pc[who] = here + 1
                    waiting[who] = True
                    group = self.warp if ".warp." in instruction.op else self.block
                    for which in np.unique(group[who]):
                        mine = (group == which) & (pc < done)
                        if waiting[mine].all():
                            waiting[mine] = False
                    break
                if active is None:
                    self.step(instruction, chosen)
                elif active.any():
                    self.step(instruction, who[active])
                here += 1
                if here in self.leaders or here == done:
                    pc[who] = here
                    break

    def step(self, instruction: Instruction, who: Any) -> None:
        op, given = instruction.op, instruction.operands
        parts = op.split(".")
        base, kind = parts[0], parts[-1]
        if base == "mov" and kind != "pred":
            if isinstance(given[0], list):
                width = size(kind) * 8 // len(given[0])
                value = self.get(given[1], kind, who)
                for i, name in enumerate(given[0]):
                    self.put(name, value >> value.dtype.type(width * i), who)
            elif isinstance(given[1], list):
                width = size(kind) * 8 // len(given[1])
                total = UNSIGNED[size(kind) * 8](0)
                for i, name in enumerate(given[1]):
                    total = total | np.asarray(self.get(name, f"b{width}", who)).astype(
                        total.dtype
                    ) << total.dtype.type(width * i)
                self.put(given[0], total, who)
            else:
                self.put(given[0], self.get(given[1], kind, who), who)
        elif base == "cvta":
            self.put(given[0], self.get(given[1], kind, who), who)
        elif base == "ld":
            self.load(instruction, parts, who)
        elif base == "st":
            self.store(instruction, parts, who)
        elif base in ("atom", "red"):
            self.atomic(instruction, parts, who)
        elif base == "shfl":
            self.shuffle(instruction, parts, who)
        elif base == "prefetch":
            return
        else:
            if op not in self.computed:
                self.computed[op] = compute(op)
            function, _, kinds = self.computed[op]
            sources = [self.get(g, kinds[min(i, len(kinds) - 1)], who) for i, g in enumerate(given[1:])]
            self.put(given[0], function(*sources), who)

    def load(self, instruction: Instruction, parts: list[str], who: Any) -> None:
        target, place = instruction.operands[:2]
        names = target if isinstance(target, list) else [target]
        width = size(parts[-1])
        if parts[1] == "param":
            base, _, offset = place[1:-1].partition("+")
            raw = self.parameters[base]
            for i, name in enumerate(names):
                begin = int(offset or 0) + i * width
                self.extend(
                    name, np.frombuffer(raw[begin : begin + width], UNSIGNED[8 * width])[0], parts[-1], who
                )
            return
        if parts[1] in ("local", "const"):
            raise NotImplementedError(instruction.text)
        address = self.address(place, who)
        total = width * len(names)
        taken = np.zeros((len(address), total), U8)
        for chosen, buffer, offset in self.memory.places(address, total, self.block[who], instruction.text):
            taken[chosen] = buffer[offset[:, None] + np.arange(total)]
        words = taken.view(UNSIGNED[8 * width])
        for i, name in enumerate(names):
            self.extend(name, words[:, i], parts[-1], who)

    def extend(self, name: str, word: Any, kind: str, who: Any) -> None:
        """Loads widen to the register: ld.s16 into a 32-bit register keeps the sign."""
        register = self.registers.get(name)
        if register is not None and kind[0] == "s":
            word = as_type(kind, word).astype(SIGNED[register.dtype.itemsize * 8])
        self.put(name, word, who)

    def store(self, instruction: Instruction, parts: list[str], who: Any) -> None:
        place, source = instruction.operands[:2]
        names = source if isinstance(source, list) else [source]
        address = self.address(place, who)
        kind = UNSIGNED[8 * size(parts[-1])]
        words = np.stack(
            [
                np.broadcast_to(np.asarray(self.get(n, parts[-1], who)).astype(kind), address.shape)
                for n in names
            ],
            1,
        )
        raw = np.ascontiguousarray(words).view(U8)
        for chosen, buffer, offset in self.memory.places(
            address, raw.shape[1], self.block[who], instruction.text
        ):
            buffer[offset[:, None] + np.arange(raw.shape[1])] = raw[chosen]

    def atomic(self, instruction: Instruction, parts: list[str], who: Any) -> None:
        if "add" not in parts or parts[-1] not in ("u32", "s32", "u64"):
            raise NotImplementedError(instruction.text)
        given = instruction.operands
        target, place, source = given if parts[0] == "atom" else ("_", *given)
        address = self.address(place, who)
        kind = UNSIGNED[8 * size(parts[-1])]
        value = np.broadcast_to(np.asarray(self.get(source, parts[-1], who)).astype(kind), address.shape)
        old = np.zeros(len(address), kind)
        width = kind().itemsize
        for chosen, buffer, offset in self.memory.places(address, width, self.block[who], instruction.text):
            for i, where in zip(np.arange(len(address))[chosen], offset):
                old[i] = buffer[where : where + width].view(kind)[0]
                buffer[where : where + width] = np.array([old[i] + value[i]], kind).view(U8)
        self.put(target, old, who)

    def shuffle(self, instruction: Instruction, parts: list[str], who: Any) -> None:
        target, source, amount, clamp = instruction.operands[:4]
        everyone = np.arange(self.count)[who]
        ready = np.zeros(self.count, bool)
        ready[everyone] = True
        lane, start = self.lane[everyone], everyone - self.lane[everyone]
        amount, clamp = (np.asarray(self.get(x, "b32", who)).astype(np.int64) for x in (amount, clamp))
        mask = clamp >> 8 & 0x1F
        last = (lane & mask) | (clamp & 0x1F & ~mask)
        first = lane & mask
        mode = parts[2]
        if mode == "bfly":
            other = lane ^ amount
        elif mode == "idx":
            other = first | (amount & ~mask)
        elif mode == "down":
            other = lane + amount
        else:
            other = lane - amount
        valid = other >= last if mode == "up" else other <= last
        other = np.where(valid, other, lane)
        if not ready[start + other].all():
            raise RuntimeError(f"{instruction.text}: reads a lane that does not take part")
        name, _, predicate = target.partition("|")
        self.put(name, self.registers[source][start + other], who)
        if predicate:
            self.put(predicate, valid, who)
