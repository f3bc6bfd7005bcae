"""Memory of copies and the shapes of tiles, by class of device: a CPU's, and a GPU's on tensors of the meta
device and on tensors of the CPU that stand for a GPU's."""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import models
import pytest
import torch
from torch import Tensor, nn

import zokern
from zokern import devices
from zokern.backends import Span, SpanList
from zokern.evaluation import Point, arena, copies
from zokern.evaluation.arena import Arena
from zokern.plan import Group, Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.recorder import META, Recorder  # noqa: E402

GIB, HERE = 1 << 30, torch.device("cpu")
BOTH = [Point(((0, 1.0),)), Point(((0, -1.0),))]


def plan_of(shapes: dict[str, tuple[int, ...]], backend: Recorder | None = None) -> Plan:
    """The plan of a step for bfloat16 weights without memory."""
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device=META) for shape in shapes.values()]
    spans = SpanList(Span(i) for i in range(len(tensors)))
    group = Group(list(shapes), tensors, spans, None, 1e-3, {}, backend or Recorder())
    direction = zokern.directions.resolve("normal")
    return Plan([group], direction, 0, 0, "nearest", None)  # type: ignore[arg-type]


def rows_of(made: copies.Copies, i: int = 0, transposed: bool = False, sides: int = 2) -> list[int]:
    tiles = made._tiles(made.plan.groups[0], i, list(range(sides)), transposed)
    return [stop - start for start, stop, _ in tiles]


# Shapes that are multiplied in published models, and the rows that a CPU's tile of them has.
MATRICES = {
    "Llama-7B, up": ((11008, 4096), 501), "Llama-7B, down": ((4096, 11008), 187),
    "Llama-8B, down": ((4096, 14336), 142), "Llama-7B, head": ((32000, 4096), 508),
    "Llama-8B, head of 128k": ((128256, 4096), 511), "OPT-1.3B, head": ((50272, 2048), 1006),
    "OPT-13B, attention": ((5120, 5120), 394), "OPT-13B, up": ((20480, 5120), 402),
    "OPT-13B, down": ((5120, 20480), 101),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_of_published_shapes(name: str, transposed: bool) -> None:
    """Whole on a GPU; where a budget does not hold that, all but the last have a multiple of 256 rows."""
    (rows, width), on_cpu = MATRICES[name]
    shape = (width, rows) if transposed else (rows, width)
    recorder = Recorder()
    plan = plan_of({"w": shape, "other": shape, "norm": (width,)}, recorder)
    one = copies.Copies(plan, BOTH[:1], Arena())
    assert rows_of(one, transposed=transposed, sides=1) == [rows]
    recorder.calls.clear()
    made = copies.Copies(plan, BOTH, Arena(2 * 2 * rows * width + (1 << 20)))
    assert rows_of(made, transposed=transposed) == [rows]
    (call,) = [call for call in recorder.calls if call.elements == rows * width]
    assert call.sides == 2, "one launch makes both sides"
    given = copies.Copies(plan, BOTH, Arena(96 << 20))
    cut = rows_of(given, transposed=transposed)
    assert sum(cut) == rows and len(cut) > 1 and all(some % 256 == 0 for some in cut[:-1])
    with patch.object(devices, "GPU", devices.CPU):
        found = rows_of(copies.Copies(plan, BOTH, Arena(64 << 20)), transposed=transposed)
    assert max(found) == on_cpu and len(found) > 4, "a CPU's tiles are as they were"


@pytest.mark.parametrize(
    "wrong", [{"rows": 1}, {"tile": 1 << 21}, {"rows": 1, "tile": 1 << 21}], ids=lambda wrong: " ".join(wrong)
)
def test_sizes_of_a_cpu_are_rejected_on_a_gpu(wrong: dict) -> None:
    with patch.object(devices, "GPU", devices.GPU._replace(**wrong)), pytest.raises(AssertionError):
        test_tiles_of_published_shapes("Llama-7B, up", False)


def test_tiles_cover_a_matrix_once() -> None:
    for kind, total, most in itertools.product(
        (devices.CPU, devices.GPU), (0, 1, 255, 256, 257, 1000), (-5, 0, 1, 7, 255, 256, 300, 1 << 40)
    ):
        rows = kind.tile_rows(total, most)
        assert 1 <= rows <= max(1, min(total, most)), (kind, total, most)


# Budgets ----------------------------------------------------------------------------------------------------

LLAMA: dict[str, tuple[int, ...]] = {"head": (32000, 4096), "norm": (4096,), "bias": (11008,)}
LLAMA |= {f"up.{i}": (11008, 4096) for i in range(6)}
HEAD, SMALL = 32000 * 4096 * 2, (4096 + 11008) * 2


@pytest.mark.parametrize(
    ("free", "low", "high"),
    [
        (100 * GIB, 2 * HEAD + 2 * SMALL, 2 * HEAD + 5 * SMALL),
        (GIB, GIB // 4, GIB // 4),
        (0, 64 << 20, 64 << 20),
    ],
)
def test_budget_of_a_gpu(free: int, low: int, high: int, monkeypatch) -> None:
    """Both sides of the largest matrix and the small tensors, within a quarter of what is free."""
    monkeypatch.setattr(devices, "free_memory", lambda device: free)
    made = copies.Copies(plan_of(LLAMA), BOTH[:1], room := Arena())
    assert low <= room.size(META) <= high
    found = rows_of(made, sides=1)
    assert (found == [32000]) == (free > 0) and all(some % 256 == 0 for some in found[:-1])
    assert {made.resident[0, i].dtype for i in (1, 2)} == {torch.float32} and len(made.resident) == 2


@pytest.mark.parametrize("free", [100 * GIB, GIB])
def test_all_sides_of_a_pass_are_copied_at_once_where_there_is_room(free: int, monkeypatch) -> None:
    """Two launches for the model, of 16 bits and of vectors in float32; 256 MB do not hold it."""
    monkeypatch.setattr(devices, "free_memory", lambda device: free)
    recorder = Recorder()
    made = copies.Copies(plan_of(LLAMA, recorder), BOTH, room := Arena())
    assert recorder.count() == (2 if free > GIB else 1)
    assert len(made.resident) == (9 if free > GIB else 2) and room.size(META) <= free // 4
    assert room.peak <= room.size(META)
    if free > GIB:
        assert room.size(META) < 2.01 * sum(t.nbytes for t in made.plan.groups[0].theta)


def test_a_budget_that_was_given_is_kept() -> None:
    copies.Copies(plan_of(LLAMA), BOTH, room := Arena(123 << 20))
    assert room.size(META) == 123 << 20
    copies.Copies(plan_of({"w": (64, 64)}), BOTH, room := Arena())
    assert room.size(META) == devices.LEAST and Arena().size(HERE) == devices.LEAST


def test_a_budget_grows_with_what_is_trained_and_does_not_shrink() -> None:
    """A step may train one part after another; copies of earlier steps are not found in memory that is
    gone."""
    room, part = Arena(), {"w": (4096, 4096), "norm": (4096,)}
    small, large = plan_of(part), plan_of(LLAMA)
    first = copies.Copies(small, BOTH, room).resident[0, 1]
    again = copies.Copies(small, BOTH, room).resident[0, 1]
    assert again is first, "prepared once"
    before = room.size(META)
    copies.Copies(large, BOTH, room)
    grown = room.size(META)
    assert grown > 4 * before
    moved = copies.Copies(small, BOTH, room).resident[0, 1]
    assert room.size(META) == grown and moved is not first
    for _ in range(2):
        copies.Copies(large, BOTH, room)
    assert room.renewals == 2


# Streams ----------------------------------------------------------------------------------------------------


def taken(streams: list[int], monkeypatch) -> list[Tensor]:
    """Tiles that one call after the other takes and releases, each on the stream that is current."""
    room, found = Arena(1 << 20), []
    resident = room.take((8,), torch.float32, HERE)
    room.settle()
    for stream in streams:
        monkeypatch.setattr(arena, "stream_of", lambda device, stream=stream: stream)
        found.append(room.take((100,), torch.float32, HERE))
        room.release()
    assert resident is not None and not any(_meets(resident, tile) for tile in found)
    return found


def _meets(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def check_streams(monkeypatch) -> None:
    first, same, other, back = taken([0, 0, 7, 0], monkeypatch)
    assert _meets(first, same) and first is back, "work of one stream is in order, so its tiles reuse memory"
    assert not _meets(first, other), "work of two streams is not in order, so their tiles may not meet"


def test_streams_have_memory_of_their_own(monkeypatch) -> None:
    check_streams(monkeypatch)


def test_memory_of_all_streams_is_rejected(monkeypatch) -> None:
    class Shared(Arena):
        def take(self, *what):
            with patch.object(arena, "stream_of", lambda device: 0):
                return super().take(*what)

    monkeypatch.setattr(sys.modules[__name__], "Arena", Shared)
    with pytest.raises(AssertionError, match="two streams"):
        check_streams(monkeypatch)


# A whole step -----------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Matrices that are made at their use."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(300, 400),
            nn.LayerNorm(400),
            nn.Linear(400, 300, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.relu(self.up(x)))).square().mean()


@pytest.mark.parametrize("way", [zokern.Scratch, zokern.Paired])
@pytest.mark.parametrize("backend", ["reference"])
def test_a_step_with_whole_matrices_reads_the_same_losses(way, backend: str, monkeypatch) -> None:
    """A CPU that stands for a GPU: a tile for each matrix, a launch for each of them, the losses of
    'master'."""
    monkeypatch.setattr(devices, "of", lambda device: devices.GPU)
    x, found = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)), []
    for evaluation in (way(check=False), "master"):
        model = models.build(Wide)
        recorder = Recorder(zokern.backends.get(backend))
        made = zokern.MeZO(model, eps=1e-2, lr=0.0, evaluation=evaluation, backend=recorder, dead_limit=None)
        monkeypatch.setattr(
            copies.Copies, "_size", staticmethod(lambda tensor: 1 << 30)
        )  # nothing is resident
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zokern.step(made, lambda model=model: model(x))
            recorder.calls.clear()
            found.append((zokern.step(made, lambda model=model: model(x)).losses, recorder))
    (mine, recorder), (right, _) = found
    assert mine[0] == pytest.approx(right[0], rel=1e-6) and mine[0][0] != mine[0][1]
    sides = 1 if way is zokern.Scratch else 2
    large = [call for call in recorder.calls if call.verb == "perturb" and call.elements == 300 * 400]
    assert len(large) == 4 // sides and {call.sides for call in large} == {sides}
