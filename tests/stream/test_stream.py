"""The stream, version 1: frozen vectors, addressing, and the C++ header against the PyTorch definition."""

from __future__ import annotations

import hashlib
import itertools
import json

import conformance
import header as native
import numpy as np
import pytest
import quality
import torch
from guarded import equal

from zokern import stream
from zokern.backends import reference
from zokern.directions import normal, resolve

needs_compiler = pytest.mark.skipif(native.why_off() is not None, reason=str(native.why_off()))
VECTORS = {
    name: json.loads((conformance.VECTORS / f"{name}-v1.json").read_text())
    for name in ("normal", "rademacher", "rounding")
}
DIRECTIONS = ("normal", "rademacher")


@pytest.fixture(scope="module", params=[("-O0",), ("-O3", "-march=native")], ids=" ".join)
def header(request) -> native.Header:
    return native.header(*request.param)


def reference_z(direction: str, v: dict, count: int) -> torch.Tensor:
    index = torch.arange(v["first"], v["first"] + count)
    return reference.z(resolve(direction), index, v["who"], v["step"], v["draw"], v["seed"])


def names(v: dict) -> tuple[int, int, int, int]:
    return v["seed"], v["who"], v["step"], v["draw"]


# --- frozen -------------------------------------------------------------------------------------------------


def test_version() -> None:
    assert stream.VERSION == 1 and all(v["version"] == 1 for v in VECTORS.values())


def test_known_answers() -> None:
    """Published Random123 answers, and boundary rows computed by other implementations of Philox."""
    rows = conformance.known_answers()
    assert len(rows) >= 14
    for rounds, counter, key, words in rows:
        assert stream.philox4x32(torch.tensor([counter]), (key[0], key[1]), rounds).tolist() == [words]


def test_parameter_ids() -> None:
    """The first four bytes of SHA-256, little endian; golden values."""
    golden = {
        "": 0x42C4B0E3,
        "a": 0x128197CA,
        "lm_head.weight": 0x5EB86678,
        "model.embed_tokens.weight": 0xAC43D4FC,
        "transformer.h.11.attn.c_attn.bias": 0x303E21B7,
        "größe": 0x67A253D3,
    }
    for name, value in golden.items():
        assert (
            stream.parameter_id(name)
            == value
            == int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_frozen_values(direction: str) -> None:
    vectors = VECTORS[direction]["values"]
    assert max(v["first"] for v in vectors) == stream.INDEX_LIMIT - 16
    for v in vectors:
        bits = stream.to_bits(reference_z(direction, v, len(v["bits"]))).tolist()
        assert [f"{b:08x}" for b in bits] == v["bits"], f"{direction} {names(v)} first {v['first']}"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_frozen_digests(direction: str) -> None:
    for v in VECTORS[direction]["digests"][1:]:  # the first is 2^20 long: test_header_has_frozen_digests
        assert hashlib.sha256(reference_z(direction, v, v["count"]).numpy()).hexdigest() == v["sha256"]


def test_frozen_rounding() -> None:
    for v in VECTORS["rounding"]["random16"]:
        index = torch.arange(v["first"], v["first"] + 16)
        assert [f"{b:04x}" for b in reference.random16(index, v["who"], v["step"], v["seed"]).tolist()] == v[
            "bits"
        ]
    x, random, *expected = rounding_columns()
    value = stream.to_float(torch.from_numpy(x))
    high, low = reference.split(value)
    got = [
        value.to(torch.bfloat16),
        reference.stochastic(value, torch.bfloat16, torch.from_numpy(random)),
        value.to(torch.float16),
    ]
    got += [reference.stochastic(value, torch.float16, torch.from_numpy(random)), high, low]
    for name, column, right in zip(VECTORS["rounding"]["columns"][2:], got, expected):
        assert (column.view(torch.int16).numpy().astype(np.int64) & 0xFFFF == right).all(), name
    equal(reference.join(high, low), value, "join(split(x))")


def rounding_columns() -> list[np.ndarray]:
    return [np.array([int(digits, 16) for digits in column]) for column in zip(*VECTORS["rounding"]["rows"])]


# --- addressing ---------------------------------------------------------------------------------------------


def test_addressing_is_injective(monkeypatch) -> None:
    """Two names never share a Philox input, because each name is a field of its own.

    The counter that `words` builds is recorded: word 0 is the block, 1 who, 2 step, 3 draw, and the key is
    the seed's two halves, so the map from (seed, who, step, draw, block) to (counter, key) has an inverse,
    which is applied here.
    """
    seen = []
    monkeypatch.setattr(stream, "philox4x32", lambda counter, key: seen.append((counter, key)))
    top = 2**32 - 1
    generator = torch.Generator().manual_seed(5)
    cases = [(0, 0, 0, 0, 0), (2**64 - 1, top, top, top, top), (2**32, 1, 2, 3, 4)]
    cases += [
        (high << 32 | low, *rest)
        for low, high, *rest in torch.randint(0, 2**32, (200, 6), generator=generator).tolist()
    ]
    for seed, who, step, draw, block in cases:
        stream.words(torch.tensor([block]), who, step, draw, seed)
        (counter, (k0, k1)) = seen.pop()
        x0, x1, x2, x3 = counter[0].tolist()
        assert (k1 << 32 | k0, x1, x2, x3, x0) == (seed, who, step, draw, block)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blocks_fill_their_word(direction: str) -> None:
    """Elements of [0, 2^35) name blocks of [0, 2^32), and each element of a block another value of it."""
    per_block = resolve(direction).per_block
    assert (stream.INDEX_LIMIT - 1) // per_block < 2**32
    assert per_block != 8 or stream.INDEX_LIMIT // per_block == 2**32
    words = torch.randint(0, 2**32, (50, 4), generator=torch.Generator().manual_seed(3))
    assert resolve(direction).values(words).shape == (50, per_block)


def test_purposes_are_disjoint() -> None:
    """The draw words of two purposes never meet, for any query; the rounding bits use theirs."""
    purposes = [stream.DIRECTION, stream.RADIUS, stream.BASIS, stream.MASK, stream.ROUNDING, stream.DROPOUT]
    ranges = [(stream.draw_word(0, p), stream.draw_word(2**24 - 1, p)) for p in purposes]
    assert all(low <= high < 2**32 for low, high in ranges)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(sorted(ranges)))
    for query in (-1, 2**24):
        with pytest.raises(ValueError, match="query"):
            stream.draw_word(query)
    index = torch.arange(32)
    word = stream.words(index // 8, 1, 2, stream.draw_word(0, stream.ROUNDING), 3)
    halves = torch.stack([word & 0xFFFF, word >> 16], dim=-1).flatten(1)
    equal(reference.random16(index, 1, 2, 3), halves.gather(1, (index % 8)[:, None])[:, 0], "rounding bits")


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "0", None])
def test_seed_refused(seed) -> None:
    with pytest.raises(ValueError, match="seed is"):
        stream.check_seed(seed)


def test_fma_rounds_once() -> None:
    """Against exact rational arithmetic, ties and near-ties included."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 300, generator=generator)
    c = torch.randn(300, generator=generator) * 2.0 ** torch.randint(-40, 40, (300,), generator=generator)
    c[:100] = -(a * b)[:100]  # cancellation
    got = stream.fma(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below, above = (torch.nextafter(result, torch.tensor(s * torch.inf)).item() for s in (-1, 1))
        error = abs(Fraction(result.item()) - exact)
        assert error <= abs(Fraction(below) - exact) and error <= abs(Fraction(above) - exact)


# --- the header ---------------------------------------------------------------------------------------------


@needs_compiler
def test_header_philox(header) -> None:
    generator = torch.Generator().manual_seed(6)
    for rounds in (7, 10):
        counter, key = torch.randint(0, 2**32, (1 << 12, 4), generator=generator), (0xDEADBEEF, 0x12345678)
        equal(torch.from_numpy(header.philox4x32(counter.numpy(), key, rounds).astype(np.int64)),
              stream.philox4x32(counter, key, rounds), f"philox4x32-{rounds}")  # fmt: skip


@needs_compiler
def test_header_normal_radii(header) -> None:
    """All 2^20 radii, each with an angle from another sector of the circle."""
    words = (
        torch.arange(2**20)
        | torch.randint(0, 2**12, (2**20,), generator=torch.Generator().manual_seed(7)) << 20
    )
    values = normal.Normal().values(words.view(-1, 4)).view(-1, 2)
    equal(torch.from_numpy(header.normal(words.numpy())), values, "normal_pair")


@needs_compiler
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_header_has_frozen_values(header, direction: str) -> None:
    for v in VECTORS[direction]["values"]:
        bits = header.draw(direction, *names(v), v["first"], 16).view(np.uint32)
        assert [f"{b:08x}" for b in bits] == v["bits"], f"{direction} {names(v)} first {v['first']}"
        one = header.value(direction, *names(v), v["first"] + 11).view(np.uint32)[0]
        assert f"{one:08x}" == v["bits"][11]


@needs_compiler
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_header_has_frozen_digests(header, direction: str) -> None:
    for v in VECTORS[direction]["digests"]:
        assert (
            hashlib.sha256(header.draw(direction, *names(v), v["first"], v["count"])).hexdigest()
            == v["sha256"]
        )


@needs_compiler
def test_header_rounding(header) -> None:
    for v in VECTORS["rounding"]["random16"]:
        bits = header.rounding_bits(v["seed"], v["who"], v["step"], v["first"], 16)
        assert [f"{b:04x}" for b in bits] == v["bits"]
    x, random, *expected = rounding_columns()
    values = x.astype(np.uint32).view(np.float32)
    halves = header.rounded(values, random)
    for j, name in enumerate(VECTORS["rounding"]["columns"][2:]):
        assert (halves[:, j] == expected[j]).all(), name
    joined = header.joined(halves[:, 4], halves[:, 5].view(np.int16))
    finite = np.isfinite(values)
    assert (joined.view(np.uint32)[finite] == values.view(np.uint32)[finite]).all()


@needs_compiler
def test_header_widens_every_half(header) -> None:
    """All 65,536 patterns of both 16-bit types, and back."""
    halves = torch.arange(2**16).to(torch.int32).numpy().astype(np.uint16)
    bfloat16, float16 = (torch.from_numpy(x) for x in header.widened(halves))
    bits = torch.from_numpy(halves.view(np.int16))
    equal(bfloat16, bits.view(torch.bfloat16).float(), "bf16_to_float")
    equal(float16, bits.view(torch.float16).float(), "fp16_to_float")
    back = header.rounded(float16.numpy(), np.zeros(2**16, np.uint32))
    finite = ~float16.isnan().numpy()
    assert (back[finite][:, 2] == halves[finite]).all() and (back[finite][:, 3] == halves[finite]).all()


@needs_compiler
def test_header_rounding_random_floats(header) -> None:
    """Random float32 patterns of all exponents, against the reference and against torch's conversions."""
    generator = torch.Generator().manual_seed(9)
    x = stream.to_float(torch.randint(0, 2**32, (1 << 16,), generator=generator))
    x[: 1 << 15] = stream.to_float(torch.randint(0x32000000, 0x47FFFFFF, (1 << 15,), generator=generator))
    random = torch.randint(0, 2**16, (1 << 16,), generator=generator)
    halves = torch.from_numpy(header.rounded(x.numpy(), random.numpy()).view(np.int16))
    for j, dtype in ((0, torch.bfloat16), (2, torch.float16)):
        equal(halves[:, j].contiguous().view(dtype), x.to(dtype), f"{dtype} nearest")
        equal(
            halves[:, j + 1].contiguous().view(dtype),
            reference.stochastic(x, dtype, random),
            f"{dtype} stochastic",
        )
    high, low = reference.split(x)
    equal(halves[:, 4].contiguous().view(torch.bfloat16), high, "residual_split, high")
    equal(halves[:, 5].contiguous(), low, "residual_split, low")


# --- the transform, counted ---------------------------------------------------------------------------------


@needs_compiler
def test_quality_of_some_sectors() -> None:
    """All 2^20 radii with 64 of the 4096 sectors; `make quality` counts all 2^32 words and prints
    docs/stream.md's table."""
    figures = quality.measure(64)
    assert figures["words"] == 2**26 and figures["broken_radii"] == 0
    assert 5.395 < figures["largest_value"] < 5.3956 and figures["smallest_radius"] > 0
    for side in ("sin", "cos"):
        # odd moments and KS need the whole circle
        bounds = {"moment_2": 2e-5, "moment_4": 2e-4, "moment_6": 5e-4}
        for name, bound in bounds.items():
            assert abs(figures[f"{side}_{name}"]) < bound, f"{side} {name} is {figures[f'{side}_{name}']}"


@needs_compiler
def test_quality_rejects_other_figures() -> None:
    """The bounds that `make quality` applies do reject: one sector in 512 is no whole circle."""
    assert quality.problems(quality.measure(512))
