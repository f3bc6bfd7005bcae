"""Writes normal-v1.json, rademacher-v1.json and rounding-v1.json from the reference: `python
tests/vectors/make_vectors.py`.

They freeze version 1 of the stream, so the script refuses to change a file that is there: a changed bit is a
new version, with new files. Values are the hex digits of their float32 (or 16-bit) pattern; digests are
SHA-256 of little-endian float32.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from zokern import stream
from zokern.backends import reference
from zokern.directions import resolve

HERE = Path(__file__).parent
LAST = stream.INDEX_LIMIT

# (seed, who, step, draw): zero, ordinary names, and every word at its largest
NAMES = [
    (0, 0, 0, 0),
    (1, stream.parameter_id("lm_head.weight"), 0, 0),
    (0x0123456789ABCDEF, stream.parameter_id("model.layers.0.mlp.up_proj.weight"), 19999, 3),
    (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
    (2**32, 1, 2, stream.draw_word(5, stream.RADIUS)),
]
FIRSTS = [0, 5, 2**31 - 8, 2**32 - 4, 2**33 + 3, LAST - 16]
LONG = (42, stream.parameter_id("long"), 7, 1)
LONG_COUNT, PIECE = 2**26, 2**22


def drawn(direction: str, names: tuple[int, int, int, int], first: int, count: int) -> torch.Tensor:
    seed, who, step, draw = names
    return reference.z(resolve(direction), torch.arange(first, first + count), who, step, draw, seed)


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def named(names: tuple[int, int, int, int], **rest) -> dict:
    return dict(zip(("seed", "who", "step", "draw"), names)) | rest


def direction_vectors(direction: str) -> dict:
    """Values at the limits of blocks and of 32-bit indices,
    digests of long runs, and 2^26 values in pieces."""
    values, digests = [], []
    for names in NAMES:
        for first in FIRSTS:
            bits = stream.to_bits(drawn(direction, names, first, 16)).tolist()
            values.append(named(names, first=first, bits=[f"{b:08x}" for b in bits]))
    for names, first, count in zip(
        NAMES, (0, 3, 2**32 - 2**15, LAST - 2**17, 2**31 + 1), (2**20, 2**16, 2**16, 2**17, 2**18)
    ):
        digests.append(
            named(names, first=first, count=count, sha256=digest(drawn(direction, names, first, count)))
        )
    pieces = [digest(drawn(direction, LONG, first, PIECE)) for first in range(0, LONG_COUNT, PIECE)]
    long = named(LONG, first=0, count=LONG_COUNT, piece=PIECE, sha256=pieces)
    return {
        "version": stream.VERSION,
        "direction": direction,
        "values": values,
        "digests": digests,
        "long": long,
    }


def rounding_vectors() -> dict:
    """16 bits of the stream by element, and float32 patterns with their roundings."""
    bits = []
    for seed, who, step, _ in NAMES:
        for first in FIRSTS:
            random = reference.random16(torch.arange(first, first + 16), who, step, seed).tolist()
            bits.append(
                {"seed": seed, "who": who, "step": step, "first": first, "bits": [f"{b:04x}" for b in random]}
            )
    edges = [
        0, 1, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x800000, 0x337FFFFF, 0x33000000, 0x33000001, 0x33800000,
        0x387FFFFF, 0x38800000, 0x38801000, 0x38803000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F7FFFFF,
        0x477FEFFF, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000,
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    wild = torch.randint(0, 0x7F800000, (40,), generator=generator).tolist()
    half = torch.randint(0x33000000, 0x47800000, (40,), generator=generator).tolist()
    patterns = [sign | p for p in edges + wild + half for sign in (0, 0x80000000)]
    random = torch.randint(0, 2**16, (len(patterns),), generator=generator)
    random[: len(edges)] = torch.tensor([0, 0xFFFF, 0x8000, 0x7FFF]).repeat(7)[: len(edges)]
    x = stream.to_float(torch.tensor(patterns))
    high, low = reference.split(x)
    columns = {
        "float32": torch.tensor(patterns),
        "random16": random,
        "bfloat16_nearest": x.to(torch.bfloat16),
        "bfloat16_stochastic": reference.stochastic(x, torch.bfloat16, random),
        "float16_nearest": x.to(torch.float16),
        "float16_stochastic": reference.stochastic(x, torch.float16, random),
        "residual_high": high,
        "residual_low": low,
    }

    def digits(column: torch.Tensor, width: int) -> list[str]:
        bits = column if column.dtype == torch.int64 else column.view(torch.int16).to(torch.int64) & 0xFFFF
        return [f"{b:0{width}x}" for b in bits.tolist()]

    table = [digits(column, 8 if name == "float32" else 4) for name, column in columns.items()]
    return {
        "version": stream.VERSION,
        "random16": bits,
        "columns": list(columns),
        "rows": [list(row) for row in zip(*table)],
    }


def as_text(data: dict) -> str:
    """JSON with one vector a line, so that a difference reads as one."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            lines = ",\n  ".join(json.dumps(item) for item in value)
            parts.append(f'"{key}": [\n  {lines}\n ]')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{" + ",\n ".join(parts) + "}\n"


def main() -> int:
    changed = []
    for name, make in (
        ("normal", lambda: direction_vectors("normal")),
        ("rademacher", lambda: direction_vectors("rademacher")),
        ("rounding", rounding_vectors),
    ):
        path, text = HERE / f"{name}-v{stream.VERSION}.json", as_text(make())
        if not path.exists():
            path.write_text(text)
            print(f"wrote {path.name}")
        elif path.read_text() == text:
            print(f"{path.name} is what the reference computes")
        else:
            changed.append(path.name)
    for name in changed:
        print(
            f"{name} differs from the reference; version {stream.VERSION} is frozen, so raise stream.VERSION",
            file=sys.stderr,
        )
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
