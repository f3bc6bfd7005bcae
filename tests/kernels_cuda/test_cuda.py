"""csrc/elementwise.cu and axpy.cu on the host: what nvcc compiles, compiled by g++ through cuda_shim, bit for
bit the reference.

Covers tables, chunks, alignment, tails, strides, rows, slices of columns, every dtype, rounding and number of
draws, and that no result depends on the grid or on the order of blocks and threads. What only nvcc sees is
the subject of test_ptx.py and test_sass.py; on a GPU, `make gpu` runs the same suite.
"""

from __future__ import annotations

import contextlib
import functools
import types

import conformance
import host
import pytest
import torch
from cuda_backends import OnHost

from zokern import backends
from zokern.backends import Batch, Noise, cuda, triton


@pytest.mark.parametrize("check", conformance.CHECKS)
def test_host_is_the_reference(on_host, check) -> None:
    conformance.CHECKS[check](OnHost(on_host), "cpu", "quick" if check == "large" else "full")


@pytest.mark.parametrize("blocks", [1, 5, 1000])
def test_grid_changes_nothing(on_host, blocks) -> None:
    """One block for everything, a few, more than there is work for."""
    for check in ("axpy_sizes", "axpy_strides", "perturb_rows"):
        conformance.CHECKS[check](OnHost(on_host, blocks), "cpu", "quick")


def test_order_and_parts_change_nothing(on_host, monkeypatch) -> None:
    """Threads last to first, on a device so large that 16 blocks share a chunk."""
    monkeypatch.setenv("ZO_SHIM_ORDER", "1")
    monkeypatch.setenv("ZO_SHIM_PROCESSORS", "148")
    for check in ("axpy_sizes", "axpy_strides", "perturb_rows", "draw_firsts", "large"):
        if check in conformance.CHECKS:
            conformance.CHECKS[check](OnHost(on_host), "cpu", "quick")


def test_a_device_is_asked_once(on_host, monkeypatch) -> None:
    """Attributes and occupancy take longer than a launch: a second one of the same kernel does without."""
    monkeypatch.setenv("ZO_SHIM_PROCESSORS", "7")  # a device that no other test has asked
    checks = ("axpy_strides", "perturb_rows", "draw_firsts")
    for check in checks:
        conformance.CHECKS[check](OnHost(on_host), "cpu", "quick")
    monkeypatch.setenv("ZO_SHIM_MUTE", "1")
    for check in checks:
        conformance.CHECKS[check](OnHost(on_host), "cpu", "quick")
    monkeypatch.setenv("ZO_SHIM_PROCESSORS", "9")  # another device is not known by this one's numbers
    with pytest.raises(RuntimeError, match="invalid configuration"):
        conformance.CHECKS["axpy_strides"](OnHost(on_host), "cpu", "quick")


# One module holds every mistake; ZO_SHIM_MISTAKE chooses which one it makes.
MISTAKES = [
    ("last element of a tail", "end - column : kUnit);", "end - column - {wrong} : kUnit);"),
    ("first element of a row", "begin - column : kUnit) : 0);", "begin - column + {wrong} : kUnit) : 0);"),
    (
        "32-bit index",
        "Direction::kNormal ? unit : unit >> 4",
        "Direction::kNormal ? ({wrong} ? unit & 0x1fffffff : unit) : unit >> 4",
    ),
    ("round key", "round) * kPhiloxW1", "round + ({wrong} && round == 9)) * kPhiloxW1"),
    ("contracted fma", "mul_rn(decay, v[j])", "mul_rn(decay, {wrong} ? v[j] + 1e-8f : v[j])"),
    (
        "contracted fma of a piece",
        "mul_rn(term.decay, v[i])",
        "mul_rn(term.decay, {wrong} ? v[i] + 1e-8f : v[i])",
    ),
    ("second sign", "scales[0], scales[1]);", "scales[0], {wrong} ? -scales[0] : scales[1]);"),
    (
        "thread-keyed stream",
        "(p.unit, Name(e.who, step, draw",
        "(p.unit + {wrong} * threadIdx.x, Name(e.who, step, draw",
    ),
    ("half of a residual", "(low_odd)) << 16;", "({wrong} ? low_even : low_odd)) << 16;"),
    ("nobody counts", "if (!watch.seen())", "if (!watch.seen() || {wrong})"),
    (
        "pitch",
        "static_cast<uint64_t>(source) * e.pitch",
        "static_cast<uint64_t>(source) * ({wrong} ? columns : e.pitch)",
    ),
    ("a byte of a tile", "bytes[step * kWarp]", "bytes[({wrong} ? step ^ 1 : step) * kWarp]"),
    (
        "the last block of a tile",
        "= make_uint4(words.w[0]",
        "= make_uint4(words.w[{wrong} && lane == 31 ? 1 : 0]",
    ),
    ("units before a tile", "begin = 0, end = head)", "begin = 0, end = {wrong} ? 0 : head)"),
    (
        "units after a tile",
        "uint32_t end = place.count;;",
        "uint32_t end = {wrong} && tiled != 0 ? begin : place.count;;",
    ),
    ("the clock", "static_cast<uint32_t>(*list.clock)", "static_cast<uint32_t>({wrong} ? 0 : *list.clock)"),
    ("a byte of signs", "(unit & 3u) * 8u", "(unit & ({wrong} ? 1u : 3u)) * 8u"),
    ("rounding of the first draw", "? term - 1 - all", "? ({wrong} ? term - terms.each : term - 1) - all"),
    (
        "rounding bits of a piece",
        "last_step(), kRoundingDraw, keys), keys);\n      values",
        "{wrong} + last_step(), kRoundingDraw, keys), keys);\n      values",
    ),
    (
        "the decay of the first sum",
        "begin(kept[u], term->decay",
        "begin(kept[u], ({wrong} ? begin : term)->decay",
    ),
    (
        "one rounding for all steps of a piece",
        "if (--left != 0 ||",
        "if (--left != 0 || ({wrong} && k + 1 < terms.count) ||",
    ),
    ("the first 32 terms for all", "ready(done);", "ready({wrong} ? 0 : done);"),
    (
        "the first terms again for the next unit",
        "if constexpr (kLong) ready(0);",
        "if (kLong && !({wrong} && i >= kThreads)) ready(0);",
    ),
    ("the first sums for all", "sums<false>(k,", "sums<false>({wrong} ? 0 : k,"),
    ("the first long sum for all", "sums<true>(k,", "sums<true>({wrong} ? 0 : k,"),
    (
        "random bits of the step before",
        "Name(who, term.step + terms",
        "Name(who, term.step - {wrong} + terms",
    ),
    ("the first 32 steps for all", "mine = k + static_cast", "mine = ({wrong} ? 0 : k) + static_cast"),
    ("two steps of four twice", "add(term + n);", "add(term + ({wrong} ? n & 2 : n));"),
    (
        "the steps that are left",
        "for (; term != end; ++term) add(term);",
        "for (; !{wrong} && term != end; ++term) add(term);",
    ),
    (
        "the terms that are left",
        "for (; term != stop; ++term) add(term);",
        "for (; term != stop; ++term) add({wrong} ? stop - 1 : term);",
    ),
    (
        "the end of a long sum",
        "here - done < kWarp ? here - done : kWarp",
        "!{wrong} && here - done < kWarp ? here - done : kWarp",
    ),
    (
        "a second unit is left out",
        "(!kLong && u == 0) || i",
        "(!kLong && u == 0) || {wrong} * place.count + i",
    ),
    (
        "a lane's second unit",
        "first_product<kDirection>(place.begin + i + u * turn.lanes)",
        "first_product<kDirection>(place.begin + i + ({wrong} ? 0 : u) * turn.lanes)",
    ),
]


@pytest.fixture(scope="session")
def mistaken() -> types.ModuleType:
    return host.mistaken(MISTAKES)


@pytest.mark.parametrize("mistake", [name for name, *_ in MISTAKES])
def test_wrong_kernel_is_rejected(mistaken, monkeypatch, mistake) -> None:
    number = 1 + [name for name, *_ in MISTAKES].index(mistake)
    monkeypatch.setenv("ZO_SHIM_MISTAKE", str(number))
    backend = OnHost(mistaken)
    for check in conformance.CHECKS:  # until one rejects it
        problem = conformance.run(backend, "cpu", "quick", [check])[check]
        if problem:
            print(f"{mistake}: {check}: {problem}")
            assert "AssertionError" in problem
            return
    raise AssertionError(f"no check rejects {mistake!r}")


def test_wrong_kernels_are_right_otherwise(mistaken, monkeypatch) -> None:
    monkeypatch.setenv("ZO_SHIM_MISTAKE", "0")
    assert conformance.run(OnHost(mistaken), "cpu", "quick", ["axpy_sizes", "perturb_rows"]) == {
        "axpy_sizes": None,
        "perturb_rows": None,
    }


# What happens where there is no GPU


def test_why_off_says_why_and_the_way_out(monkeypatch) -> None:
    def no_driver() -> int:
        raise RuntimeError(
            "cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version (CUDA error 35)"
        )

    monkeypatch.setattr(cuda, "_cuda", None)
    assert "zokern._cuda is missing" in cuda.why_off() and "nvcc" in cuda.why_off()
    monkeypatch.setattr(cuda, "_cuda", types.SimpleNamespace(device_count=no_driver))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in cuda.why_off()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver version is insufficient" in cuda.why_off() and "install an NVIDIA driver" in cuda.why_off()
    monkeypatch.setattr(cuda, "_cuda", types.SimpleNamespace(device_count=lambda: 0))
    assert "no CUDA device" in cuda.why_off()


def box(monkeypatch, capabilities: list[tuple[int, int]], built: list[str]) -> None:
    """A machine with these GPUs, and a module with code for these architectures."""
    module = types.SimpleNamespace(device_count=lambda: len(capabilities), architectures=lambda: built)
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: f"GPU {i}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(triton, "_missing", "")
    for cached in (backends.get, backends.default, backends._named):
        monkeypatch.setattr(backends, cached.__name__, functools.cache(cached.__wrapped__))


ALL = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_100"]
COVERED = {  # what is built, a GPU, and whether the first serves the second
    "T4": (ALL, (7, 5), False),
    "A100": (ALL, (8, 0), True),
    "H200": (ALL, (9, 0), True),
    "Thor, by PTX": (ALL, (11, 0), True),
    "Ada by code of Ampere": (["sm_80", "compute_80"], (8, 9), True),
    "Hopper by PTX of Ampere": (["sm_80", "compute_80"], (9, 0), True),
    "Ampere, built for Hopper": (["sm_90", "compute_90"], (8, 0), False),
}


@pytest.mark.parametrize("case", COVERED)
def test_a_gpu_without_code_is_off(monkeypatch, case) -> None:
    built, capability, is_on = COVERED[case]
    box(monkeypatch, [capability], built)
    reason = cuda.why_off()
    assert (reason is None) == is_on == (cuda.why_off(torch.device("cuda")) is None)
    if reason:
        assert f"GPU 0) has compute capability {capability[0]}.{capability[1]}" in reason
        assert built[0] in reason and "backend='reference'" in reason


def test_each_gpu_of_a_mixed_box_has_its_backend(monkeypatch) -> None:
    box(monkeypatch, [(7, 5), (9, 0), (8, 0)], ["sm_90", "compute_90"])
    first, second, third = (torch.device("cuda", i) for i in range(3))
    assert cuda.why_off() is None and triton.why_off() is None
    assert backends.resolve(None, second).name == "cuda"
    assert backends.resolve(None, third).name == "triton"  # zokern._cuda has no code for it
    with pytest.warns(RuntimeWarning, match="runs its reference backend on cuda:0") as told:
        assert backends.resolve(None, first).name == "reference"
    assert "cuda is off: CUDA device 0 (GPU 0) has compute capability 7.5" in str(told[0].message)
    assert backends.resolve("cuda", second).name == "cuda"
    with pytest.raises(RuntimeError, match="'cuda' is off on cuda:0: CUDA device 0"):
        backends.resolve("cuda", first)
    with pytest.raises(RuntimeError, match="'triton' is off on cuda:0: .* expected 8.0 or newer"):
        backends.resolve("triton", first)


def test_a_verb_without_the_module_says_so(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    backend = OnHost(types.SimpleNamespace())
    backend._call = types.MethodType(cuda.Cuda._call, backend)
    with pytest.raises(RuntimeError, match="backend 'cuda' is off: the compiled module"):
        backend.draw(
            Batch([torch.empty(3)], [conformance.Span(1)]), Noise(conformance.resolve("normal"), 0, [(0, 0)])
        )


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outs\[0\] is torch.float32\[.*\] on cpu; expected a cuda tensor"):
        cuda.Cuda().draw(
            Batch([torch.empty(3)], [conformance.Span(1)]), Noise(conformance.resolve("normal"), 0, [(0, 0)])
        )


def test_a_bad_launch_raises(on_host) -> None:
    """CUDA's errors come back as exceptions with their text, and the call after them works."""
    with pytest.raises(ValueError, match="unknown implementation 'avx2'"):
        on_host.select("avx2")
    assert (
        on_host.implementation() == "cuda"
        and on_host.device_count() == 1
        and on_host.architectures() == ["host"]
    )
    with contextlib.suppress(ValueError):
        on_host.select("cuda")
