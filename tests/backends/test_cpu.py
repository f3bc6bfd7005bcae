"""What only the CPU backend has: several instruction sets in one module,
threads, chunks, floating-point modes, tables."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from zokern.backends import Batch, Noise, Span, SpanList, TensorList, Terms, cpu, cpu_module, pack
from zokern.backends.reference import Reference
from zokern.directions import resolve

pytestmark = pytest.mark.skipif(cpu.why_off() is not None, reason=str(cpu.why_off()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = [] if cpu.why_off() else cpu.architectures()
WIDTH = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(params=PATHS)
def path(request):
    before, threads = cpu.isa(), torch.get_num_threads()
    cpu.select(request.param)
    # whatever the environment says: one thread would not notice a chunk that another must do
    torch.set_num_threads(2)
    yield request.param
    cpu.select(before)
    torch.set_num_threads(threads)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(WIDTH[tensor.dtype])


def weights(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def axpy(
    backend, theta, direction="normal", first=0, draws=((3, 1),), coeffs=(0.3,), decay=1.0, rounding="nearest"
):
    found = backend.axpy_(
        Batch([theta], [Span(77, first)], rounding),
        Noise(resolve(direction), 5, list(draws)),
        Terms(torch.tensor(coeffs), decay),
    )
    return int(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["normal", "rademacher"])
def test_every_path_is_the_reference(path, direction, dtype):
    """Heads and tails of blocks, of vectors and of 64-block pieces, in both directions."""
    for n in (1, 7, 33, 513, 1025, 8300):
        for first in (0, 1, 127, 2**31 - 5, 2**32 + 3, 2**35 - n):
            ours, theirs = weights(n, dtype, n), weights(n, dtype, n)
            decay = 0.97 if first % 2 else 1.0
            axpy(cpu.Cpu(), ours, direction, first, decay=decay)
            axpy(Reference(), theirs, direction, first, decay=decay)
            assert torch.equal(bits(ours), bits(theirs)), (n, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_is_written(path, dtype):
    for n in (1, 31, 100, 1025):
        buffer = torch.full((n + 128,), 7.0, dtype=dtype)
        axpy(cpu.Cpu(), buffer[64 : 64 + n], first=3)
        cpu.Cpu().draw(Batch([buffer[64 : 64 + n]], [Span(1, 5)]), Noise(resolve("normal"), 1, [(2, 3)]))
        assert (buffer[:64] == 7).all() and (buffer[64 + n :] == 7).all()


@pytest.mark.parametrize("direction", ["normal", "rademacher"])
def test_paths_agree_on_many_values(direction):
    """2**22 values of each vector path against the scalar header functions,
    and one piece against the reference."""
    n, values = 1 << 22, {}
    before = cpu.isa()
    for name in PATHS:
        cpu.select(name)
        values[name] = torch.empty(n)
        cpu.Cpu().draw(
            Batch([values[name]], [Span(9, 2**33 - 11)]), Noise(resolve(direction), 2**63 + 1, [(4, 5)])
        )
    cpu.select(before)
    assert all(torch.equal(bits(values["scalar"]), bits(value)) for value in values.values())
    expected = torch.empty(1 << 16)
    Reference().draw(Batch([expected], [Span(9, 2**33 - 11)]), Noise(resolve(direction), 2**63 + 1, [(4, 5)]))
    assert torch.equal(values["scalar"][: 1 << 16], expected)


def test_thread_count_changes_no_bit(path, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        theta = weights(300_001, torch.bfloat16, 1)
        axpy(cpu.Cpu(), theta, first=9, rounding="stochastic")
        results.append(theta)
    assert all(torch.equal(bits(results[0]), bits(result)) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_results_are_counted(path, dtype):
    """Also a finite float32 that overflows only in the rounding to a 16-bit type."""
    for n in (40, 70_001):
        ours = weights(n, dtype, 2)
        ours[n // 2] = float("nan")
        ours[n - 1] = -float("inf")
        ours[3] = torch.finfo(dtype).max
        theirs = ours.clone()
        found = axpy(cpu.Cpu(), ours, coeffs=(torch.finfo(dtype).eps * torch.finfo(dtype).max,))
        assert found == axpy(Reference(), theirs, coeffs=(torch.finfo(dtype).eps * torch.finfo(dtype).max,))
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
        assert axpy(cpu.Cpu(), weights(n, dtype, 2)) == 0
        assert axpy(cpu.Cpu(), weights(n, dtype, 2), coeffs=(float("nan"),)) == n


def test_float16_overflow_at_the_boundary(path):
    """65519.996 rounds to 65504 and 65520 to inf."""
    theta = torch.full((64,), 65504.0, dtype=torch.float16)
    assert axpy(cpu.Cpu(), theta.clone(), "rademacher", coeffs=(15.99,)) == 0
    ours, theirs = theta.clone(), theta.clone()
    assert (
        axpy(cpu.Cpu(), ours, "rademacher", coeffs=(16.0,))
        == axpy(Reference(), theirs, "rademacher", coeffs=(16.0,))
        > 0
    )
    assert torch.equal(bits(ours), bits(theirs))


def test_flush_to_zero_of_the_caller_changes_nothing(path):
    theta, coefficient, spans = torch.full((100,), 1e-41), torch.tensor([1e-41]), [Span(77)]
    expected = theta.clone()
    Reference().axpy_(Batch([expected], spans), Noise(resolve("normal"), 5, [(3, 1)]), Terms(coefficient))
    flushes = torch.set_flush_denormal(True)
    try:
        cpu.Cpu().axpy_(Batch([theta], spans), Noise(resolve("normal"), 5, [(3, 1)]), Terms(coefficient))
        # the caller's mode is as it was
        assert not flushes or (torch.full((64,), 0.5) * 2e-38 == 0).all()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(theta), bits(expected)) and (theta != 0).any()


def test_a_wrong_stream_is_noticed():
    """The comparisons above can fail: another seed word, parameter or element number gives other bits."""
    base = torch.empty(64)
    cpu.Cpu().draw(Batch([base], [Span(9)]), Noise(resolve("normal"), 5, [(4, 0)]))
    for span, seed in ((Span(9), 5 + 2**32), (Span(10), 5), (Span(9, 1), 5)):
        other = torch.empty(64)
        cpu.Cpu().draw(Batch([other], [span]), Noise(resolve("normal"), seed, [(4, 0)]))
        assert (bits(base) != bits(other)).sum() > 60


def test_chunks_cover_every_element_once():
    shapes = [(3,), (70_000,), (1 << 17,), (0,), (300, 700)]
    tensors = [torch.zeros(shape) for shape in shapes]
    spans = [Span(i, first) for i, first in enumerate((0, 5, 127, 0, 2**32 + 1))]
    tensors.append(torch.zeros(5, 40, 60).transpose(0, 1)[:, :, ::2])
    spans.append(Span(5))
    entries, chunks = pack.pack(tensors, spans)
    for number, entry in enumerate(entries):
        own = chunks[chunks["entry"] == number]
        total = int(entry["row_count"] * entry["columns"])
        assert (
            own["begin"][0] == 0 and own["end"][-1] == total and (own["begin"][1:] == own["end"][:-1]).all()
        )
        cuts = (own["begin"][1:] + np.int64(entry["first"])) % pack.ALIGN
        assert (cuts == 0).all() and (own["end"] > own["begin"]).all()
    assert int((entries["row_count"] * entries["columns"]).sum()) == sum(tensor.numel() for tensor in tensors)


def test_forced_path():
    """ZOKERN_CPU_ISA chooses a path when the module is loaded;
    an unusable name is an error that lists the usable ones.

    The compiled module decides, and is loaded without torch, which takes seconds.
    """
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('_cpu', {cpu_module._cpu.__file__!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.implementation())"
    )

    def chosen(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ZOKERN_CPU_ISA": name},
            capture_output=True,
            text=True,
        )

    assert chosen("scalar").stdout.strip() == "scalar", chosen("scalar").stderr
    wrong = chosen("mmx")
    assert wrong.returncode != 0 and "mmx" in wrong.stderr and "scalar" in wrong.stderr


def test_refusals():
    class Unknown:
        name, per_block = "laplace", 8

    with pytest.raises(NotImplementedError, match="laplace.*normal.*reference"):
        cpu.Cpu().draw(Batch([torch.empty(4)], [Span(1)]), Noise(Unknown(), 0, [(0, 0)]))
    with pytest.raises(ValueError, match=r"outs\[0\] is torch.float32\[4\] on meta"):
        cpu.Cpu().draw(
            Batch([torch.empty(4, device="meta")], [Span(1)]), Noise(resolve("normal"), 0, [(0, 0)])
        )
    with pytest.raises(ValueError, match="chunk_count"):
        cpu_module._cpu.draw(0, 0, -1, 0, 0, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="null"):
        cpu_module._cpu.draw(0, 0, 1, 0, 0, 0, 0, 1, 0)


@pytest.mark.parametrize("compiled", [True, False])
def test_same_values_compares_objects_and_not_what_they_equal(compiled: bool, monkeypatch) -> None:
    """An equal object in the place of another, one more,
    one less and another order are found; no __eq__ is called."""
    if not compiled:
        monkeypatch.setattr(cpu_module, "_cpu", None)
    first, second = torch.ones(2), torch.ones(2)
    dicts = [{"a": first, "b": 1}, {}, {"c": None}]
    kept = [first, 1, None]
    assert cpu_module.same_values(dicts, kept)
    assert not cpu_module.same_values(dicts, [second, 1, None])
    assert not cpu_module.same_values(dicts, kept[:-1]) and not cpu_module.same_values(dicts, [*kept, None])
    assert not cpu_module.same_values(dicts, [1, first, None])
    assert not cpu_module.same_values(dicts[:-1], kept) and cpu_module.same_values([], [])


def test_same_values_looks_at_every_one_of_many_dicts() -> None:
    """Memory is asked for some dicts ahead, those of objects and of no value among them."""

    class Holder:
        def __init__(self, i: int) -> None:
            self.number, self.name = i, f"holder {i}"

    holders = [Holder(i) for i in range(50)]
    dicts = [held for holder in holders for held in (vars(holder), {}, {i: str(i) for i in range(30)})]
    kept = [value for held in dicts for value in held.values()]
    assert cpu_module.same_values(dicts, kept)
    for i in (0, 49):
        holders[i].name = f"another {i}"
        assert not cpu_module.same_values(dicts, kept)
        holders[i].name = kept[1 + 32 * i]
    assert cpu_module.same_values(dicts, kept)
    with pytest.raises(ValueError, match="no dict"):
        cpu_module._cpu.same_values([*dicts, []], kept)


def check_copy(copy, dtype: torch.dtype) -> None:
    """Every bit of tensors of all sizes, those of no number too, and nothing beside them.

    Again for lists that were prepared, after other values were written."""
    sizes, gap = [0, 1, 5, 4096, 3 * pack.CHUNK_ELEMENTS + 7, 33], 16
    room = [torch.full((n + 2 * gap,), 7.0, dtype=dtype) for n in sizes]
    thetas = TensorList.lasting([weights(n, dtype, n) for n in sizes])
    outs = TensorList.lasting([whole[gap : gap + n] for whole, n in zip(room, sizes)])
    spans = SpanList([Span(i) for i in range(len(sizes))])
    for _ in range(2):
        copy(Batch(thetas, spans), outs)
        for whole, out, theta in zip(room, outs, thetas):
            assert torch.equal(bits(out), bits(theta)), f"{theta.numel()} elements"
            assert (whole[:gap] == 7.0).all() and (whole[gap + theta.numel() :] == 7.0).all()
        for theta in thetas:  # all patterns of a half, or of the upper half of a float
            halves = theta.view(torch.int16)
            halves.copy_(torch.arange(halves.numel()).mul(2**15 + 1).to(torch.int16))
    apart = torch.zeros(4, 6, dtype=dtype)[:, ::2]
    copy(Batch([weights(12, dtype, 1).view(4, 3)], [Span(1)]), [apart])
    assert torch.equal(apart, weights(12, dtype, 1).view(4, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
def test_copy_keeps_every_bit(count: int, dtype: torch.dtype, threads) -> None:
    threads(count)
    check_copy(cpu.Cpu().copy_, dtype)
    check_copy(lambda batch, outs: cpu.Cpu().copy_(batch._replace(tensors=outs), batch.tensors, True), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["by arithmetic", "first chunks alone", "as it was"])
def test_check_rejects_copies(wrong: str, dtype: torch.dtype) -> None:
    kept: dict[int, list[torch.Tensor]] = {}

    def copy(batch: Batch, outs) -> None:
        if wrong == "by arithmetic":
            noise = Noise(resolve("normal"), 0, [(0, 0)])
            cpu.Cpu().perturb(batch, noise, [0.0], [outs])
        else:
            now = [theta.clone() for theta in batch.tensors]
            if wrong == "as it was":
                now = kept.setdefault(id(outs), now)
            for out, theta in zip(outs, now):
                part = slice(None) if wrong == "as it was" else slice(pack.CHUNK_ELEMENTS)
                out[part].copy_(theta[part])

    with pytest.raises(AssertionError):
        check_copy(copy, dtype)


def test_a_missing_openmp_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(cpu_module, "_cpu", None)
    monkeypatch.setattr(cpu_module, "_error", "libgomp.so.1: cannot open shared object file")
    assert "apt-get install libgomp1" in str(cpu_module.why_off())
    monkeypatch.setattr(cpu_module, "_error", "No module named 'zokern._cpu'")
    assert "libgomp1" not in str(cpu_module.why_off()) and "pip install" in str(cpu_module.why_off())
