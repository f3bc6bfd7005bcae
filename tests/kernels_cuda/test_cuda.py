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
from mistakes import CUDA

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


@pytest.mark.parametrize("mistake", [name for name, *_ in CUDA])
def test_wrong_kernel_is_rejected(on_host, monkeypatch, mistake) -> None:
    host.choose(monkeypatch, CUDA, mistake)
    backend = OnHost(on_host)
    for check in conformance.CHECKS:  # until one rejects it
        problem = conformance.run(backend, "cpu", "quick", [check])[check]
        if problem:
            print(f"{mistake}: {check}: {problem}")
            assert "AssertionError" in problem or "misaligned address" in problem
            return
    raise AssertionError(f"no check rejects {mistake!r}")


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
