"""Seeds named after the test, reasons for skips in the report, and threads that sleep while they wait."""

from __future__ import annotations

import gc
import os
import types
import zlib

import host
import pytest

# Read when OpenMP is loaded. A thread that waits by spinning takes the core from the one it waits for as soon
# as anything else runs: with one other busy process on two cores, small parallel loops take ten times as
# long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # the others have the other cores; a test that is about threads sets their number
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

# The files that take longest, longest first. A worker takes the next file when it has done one: a long one
# must not be the last. test_cuda compiles what four others read: those come when that is done.
LONGEST = (
    "test_triton",
    "test_composition",
    "test_linear_triton",
    "test_cuda",
    "test_reports",
    "test_scaled_triton",
    "test_wheel",
    "test_study",
    "test_restart",
    "test_device_numbers",
    "test_processes",
    "test_sass",
    "test_architectures",
    "test_lowrank_triton",
    "test_conformance",
    "test_update_sass",
    "test_deferred",
    "test_update_triton",
    "test_shards",
    "test_step",
    "test_methods",
    "test_trainer",
    "test_evaluations",
    "test_compiled",
    "test_ptx",
    "test_wrong",
    "test_project_triton",
    "test_gpu",
    "test_bench",
    "test_eager_methods",
    "test_train",
    "test_demo",
    "test_project_cuda",
    "test_lowrank_cuda",
    "test_scaled_cuda",
    "test_update_cuda",
    "test_lowrank_sass",
    "test_directions",
    "test_predict",
    "test_update",
    "test_parallel",
    "test_ops",
    "test_masked",
    "test_scaled",
    "test_project",
    "test_models",
    "test_statistics",
    "test_docs",
    "test_site",
)


def pytest_configure(config) -> None:
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # a test that cannot run here says why


def pytest_collection_modifyitems(items) -> None:
    if WORKER:
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is frozen when Python ends is called a leak by nanobind


def pytest_runtestloop(session) -> None:
    """Interpreters run beside the tests that do not need them."""
    if not session.config.option.collectonly and not WORKER:
        for module in {
            item.module for item in session.items if "interpreted" in getattr(item, "fixturenames", ())
        }:
            module.CHILD.start()


@pytest.fixture
def interpreted(request) -> dict[str, str | None]:
    """What the interpreter that the file has started found."""
    return request.module.CHILD.verdicts()


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Collecting garbage in a test looks at the objects of its own file, not at a million others."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(request) -> None:
    """torch's global stream starts from the test's name."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def by_tiles(monkeypatch) -> None:
    """z in tiles and products by torch, whatever the processor."""
    from zokern.gemm import library

    monkeypatch.setattr(library, "yields", lambda dtype: False)


@pytest.fixture(params=[False, True], ids=["tiles", "fused"])
def both_products(request, monkeypatch) -> None:
    """That, and z made beside the product by csrc/linear.cpp, whatever the processor."""
    from zokern.backends import cpu
    from zokern.gemm import library

    if request.param and cpu.why_off() is not None:
        pytest.skip(f"no compiled product: {cpu.why_off()}")
    monkeypatch.setattr(library, "yields", lambda dtype: request.param)


@pytest.fixture(autouse=True)
def grad_mode():
    """A deliberately wrong version may leave its grad mode on the thread;
    the next test starts from this one's."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)


@pytest.fixture
def one_thread():
    """For files of tiny models, by `pytestmark`: a second thread has nothing to do there,
    and waits for the first whenever cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def on_host() -> types.ModuleType:
    """csrc/*.cu on the host."""
    if reason := host.missing():
        pytest.skip(reason)
    return host.build()


@pytest.fixture(scope="module", params=["avx512", "avx2", "scalar"])
def cpu(request):
    """Backend 'cpu' with each instruction set."""
    from zokern import backends

    reason = backends.why_off("cpu")
    if reason is not None:
        pytest.skip(f"backend 'cpu' is off: {reason}")
    from zokern import _cpu

    if request.param not in _cpu.architectures():
        pytest.skip(f"this machine cannot run {request.param}; it runs {_cpu.architectures()}")
    before, threads = _cpu.implementation(), torch.get_num_threads()
    _cpu.select(request.param)
    # whatever the environment says: one thread would not notice a chunk that another must do
    torch.set_num_threads(2)
    yield backends.get("cpu")
    _cpu.select(before)
    torch.set_num_threads(threads)
