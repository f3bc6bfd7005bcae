"""Launches past the binder of Triton's JIT: each has the arguments, the grid and the compiled kernel that an
ordinary call has.

Triton compiles a small kernel for sm_90; a driver that records launches stands in the place of CUDA's.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from zokern.backends import (  # noqa: E402
    Batch,
    Noise,
    Outer,
    Span,
    SpanList,
    TensorList,
    Terms,
    Update,
    binder,
    device_tables,
)
from zokern.backends import triton as backend  # noqa: E402
from zokern.directions import resolve  # noqa: E402

if backend._missing or backend.interpreted():
    pytest.skip("Triton is missing or interprets", allow_module_level=True)


@triton.jit(do_not_specialize=["rows", "chunks", "step", "keys"], do_not_specialize_on_alignment=["count"])
def kernel(
    rows, chunks, names, numbers, count, each, step, scale, keys, KIND: tl.constexpr, SIDE: tl.constexpr
):
    value = tl.load(numbers + SIDE) * scale + count + each + step + keys[0] + tl.load(rows) + tl.load(chunks)
    if names is not None:
        value += tl.load(names)
    tl.store(numbers, value + KIND)


class Driver:
    """Records what is launched: (compiled kernel, grid, stream, arguments)."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        properties = {"max_shared_mem": 1 << 20}
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: (None, 2, 0, 0, 1024),
            get_device_properties=lambda _: properties,
            unload_module=lambda _: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable:
        def launch(x, y, z, stream, function, packed, meta, enter, leave, *arguments) -> None:
            numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.launches.append((source.hash(), (x, y, z), stream, numbers))

        return launch


@pytest.fixture
def launches(monkeypatch, tmp_path) -> Iterator[list[tuple]]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    yield made.launches


def made() -> tuple[device_tables.Launch, device_tables.Upload]:
    launch = device_tables.Launch(torch.device("cpu"), (np.zeros(8), np.ones(4)), None)
    return launch, device_tables.upload(launch.parts, launch.device)


MEMORY, NAMES = torch.zeros(64), torch.zeros(8, dtype=torch.int64)
CALLS: list[tuple] = [  # names, numbers, count, each, step, scale, keys, KIND, blocks
    (None, MEMORY, 1, 1, 0, 1.0, (1, 2), 0, 3),
    (None, MEMORY, 1, 1, 1, 0.5, (1, 2), 0, 3),
    (NAMES, MEMORY, 1, 1, 1, 0.5, (1, 2), 0, 3),
    (None, MEMORY[1:], 1, 1, 16, 0.5, (3, -4), 0, 3),
    (NAMES, MEMORY, 2, 16, 17, 0.5, (3, 4), 0, 3),
    (NAMES, MEMORY, 3, 16, 17, 0.5, (3, 4), 0, 3),
    (NAMES, MEMORY, 3, 5, 17, 0.5, (3, 4), 0, 3),
    (NAMES, MEMORY, 3, 5, 17, 0.5, (3, 4), 1, 3),
    (NAMES, MEMORY, 3, 5, 17, 0.5, (3, 4), 1, 4),
]


def called(launch: device_tables.Launch, upload: device_tables.Upload, call: tuple) -> None:
    *arguments, kind, blocks = call
    constants, options = {"SIDE": 2, "KIND": kind}, {"num_warps": 1, "enable_fp_fusion": False}
    binder.run(kernel, blocks, launch, upload, (1, 0), tuple(arguments), constants, options)


def repeated_is_ordinary(launches: list[tuple]) -> None:
    launch, upload = made()
    for call in CALLS:
        launch.memo.clear()
        called(launch, upload, call)
    ordinary = launches[:]
    launch.memo.clear()
    for _ in range(2):
        launches.clear()
        for call in CALLS:
            called(launch, upload, call)
        assert launches == ordinary
    assert len({name for name, *_ in ordinary}) == 6  # kernels


def test_a_repeated_launch_is_an_ordinary_one(launches, monkeypatch) -> None:
    repeated_is_ordinary(launches)
    launch, upload = made()
    for call in CALLS:
        called(launch, upload, call)
    monkeypatch.setattr(kernel, "run", lambda *_, **__: pytest.fail("the binder at a repeated launch"))
    for call in CALLS:
        called(launch, upload, call)


right = binder._answer
WRONG = {
    "alignment of an address": lambda value: True if isinstance(value, torch.Tensor) else right(value),
    "one and sixteen": lambda value: 0 if isinstance(value, int) else right(value),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_key_that_lacks_an_answer_is_rejected(launches, monkeypatch, wrong) -> None:
    monkeypatch.setattr(binder, "_answer", WRONG[wrong])
    with pytest.raises(AssertionError):
        repeated_is_ordinary(launches)


def test_what_cannot_be_run_directly_is_called(launches, monkeypatch) -> None:
    """A hook that wants every call, and a Triton whose compiled kernels take other arguments."""
    launch, upload = made()
    seen = []
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *_, **__: seen.append(1)])
    for _ in range(3):
        called(launch, upload, CALLS[0])
    assert len(seen) == len(launches) == 3
    monkeypatch.setattr(kernel, "pre_run_hooks", [])
    launch.memo.clear()
    called(launch, upload, CALLS[0])
    ((name, direct),) = launch.memo.items()

    def other(*_, **__) -> None:
        raise TypeError("function takes 3 arguments")

    launch.memo[name] = direct._replace(run=other)
    for _ in range(2):
        called(launch, upload, CALLS[0])
    assert len(launches) == 6 and len({repr(one) for one in launches}) == 1


# The verbs' own kernels, which record and do nothing


class Recorded:
    """A kernel with the parameters of one of ours; both forms of a launch note all arguments in order."""

    def __init__(self, kernel: Any, seen: list) -> None:
        self.arg_names, self.params, self.pre_run_hooks, self.seen = kernel.arg_names, kernel.params, [], seen

    def note(self, way: str, grid: tuple, arguments: list) -> None:
        assert len(arguments) == len(self.arg_names)
        plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        self.seen.append((way, grid[0], dict(zip(self.arg_names, plain))))

    def __getitem__(self, grid: tuple) -> Callable:
        def launch(*arguments, num_warps, enable_fp_fusion, num_stages=3, **constants):
            names = self.arg_names[len(arguments) :]
            assert sorted(names) == sorted(constants) and not enable_fp_fusion
            self.note("ordinary", grid, [*arguments, *(constants[name] for name in names)])
            return Direct(self)

        return launch


class Direct:
    def __init__(self, kernel: Recorded) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Callable:
        return lambda *arguments, stream: self.kernel.note("direct", grid, list(arguments))


ONE, TWO, NORMAL = torch.ones(1), torch.ones(2), resolve("normal")
CLOCK, ADAM = torch.zeros(1, dtype=torch.int64), torch.ones(9)
VERBS = {
    "axpy_": lambda on, b, s, f: on.axpy_(b, Noise(NORMAL, 5, [(7, 3)]), Terms(ONE, 0.5)),
    "axpy_ of two": lambda on, b, s, f: on.axpy_(b, Noise(NORMAL, 5, [(7, 3), (7, 4)], CLOCK), Terms(TWO)),
    "perturb": lambda on, b, s, f: on.perturb(b, Noise(NORMAL, 5, [(7, 3)]), [0.5, -0.5], s),
    "update_": lambda on, b, s, f: on.update_(b, Noise(NORMAL, 5, [(7, 3)]), Update(ONE, "adam", ADAM, s)),
    "lowrank_": lambda on, b, s, f: on.lowrank_(b, f, Noise(None, 5, [(7, 3)])),
}


@pytest.fixture
def recorded(monkeypatch) -> tuple[backend.Triton, list]:
    """The backend on CPU tensors with kernels that record."""
    seen: list = []
    for file, names in (("elementwise", ("axpy", "perturb")), ("update", ("update",)),
                        ("lowrank", ("product", "element"))):  # fmt: skip
        for name in names:
            module = getattr(backend, file)
            monkeypatch.setattr(module, name, Recorded(getattr(module, name), seen))
    on = backend.Triton()
    on.is_interpreted, on.valid.device_type = False, "cpu"
    return on, seen


def arguments() -> tuple[Batch, list[TensorList], Outer]:
    shapes = [(16, 24), (5, 7)]
    thetas, *sides = (TensorList.lasting([torch.zeros(shape) for shape in shapes]) for _ in range(3))
    lefts, rights = (TensorList.lasting([torch.zeros(shape[k], 16) for shape in shapes]) for k in (0, 1))
    return Batch(thetas, SpanList([Span(1), Span(2)])), sides, Outer(lefts, rights, [1.0, 1.0])


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_passes_the_same_both_ways(recorded, verb) -> None:
    (on, seen), given = recorded, arguments()
    for _ in range(2):
        VERBS[verb](on, *given)
    half = len(seen) // 2
    assert [way for way, *_ in seen] == ["ordinary"] * half + ["direct"] * half
    for (_, blocks, first), (_, again, second) in zip(seen[:half], seen[half:]):
        first.pop("nonfinite", None), second.pop("nonfinite", None)  # a new one each time
        assert blocks == again and first == second


@pytest.mark.parametrize("verb", VERBS)
def test_a_capture_uploads_nothing(recorded, monkeypatch, verb) -> None:
    (on, seen), given = recorded, arguments()
    VERBS[verb](on, *given)
    made = on.tables.built
    monkeypatch.setattr(device_tables, "capturing", lambda device: True)
    monkeypatch.setattr(device_tables, "upload", lambda *_: pytest.fail("an upload in a capture"))
    VERBS[verb](on, *given)
    assert on.tables.built == len(on.tables.captured) == made and len(seen) % 2 == 0
    with pytest.raises(RuntimeError, match="once before the capture"):
        VERBS[verb](on, *arguments())
