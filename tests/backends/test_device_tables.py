"""The tables that the GPU backends keep on the device: built once for a list, never for another one, complete
in a captured graph.

The backends run here on the host: csrc/elementwise.cu through cuda_shim. That a captured graph replays with a
fresh z is the subject of a test that needs a GPU and is still to be written; what it depends on (no upload,
same buffers, a clock in memory) is shown here.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from threading import Barrier, BrokenBarrierError

import conformance
import conformance_kept
import numpy as np
import pytest
import torch
from conformance_kept import kept_lists, noise, numbers
from cuda_backends import OnHost
from guarded import equal

import zokern
from zokern import backends
from zokern.backends import Batch, Noise, Outer, Span, SpanList, TensorList, Terms, Update, cpu, device_tables
from zokern.backends.reference import Reference
from zokern.directions import resolve

SEED, NORMAL = 5, resolve("normal")
HERE = torch.device("cpu")


@pytest.fixture
def backend(on_host):
    return OnHost(on_host)


def update(backend, thetas, spans, clock=None, draws=((0, 0),)) -> None:
    coeffs = torch.full((len(draws),), 0.5)
    backend.axpy_(Batch(thetas, spans), Noise(NORMAL, SEED, list(draws), clock), Terms(coeffs))


def same_as_reference(backend, thetas, spans) -> None:
    """One update, compared with the reference's on copies."""
    copies = [t.clone() for t in thetas]
    update(backend, thetas, spans)
    update(Reference(), copies, spans)
    for theta, copy in zip(thetas, copies):
        equal(theta, copy, "theta")


def test_a_list_has_one_table(backend) -> None:
    thetas, spans = [torch.ones(300), torch.ones(5, 7, dtype=torch.bfloat16)], [Span(1), Span(2, 40)]
    for step in range(4):
        update(backend, thetas, spans, draws=[(step, 0)])  # another step, the same table
    assert backend.tables.built == 1
    (kept,) = backend.tables.kept.values()
    update(backend, list(thetas), list(spans))
    assert next(iter(backend.tables.kept.values())) is kept


def test_names_of_several_terms_are_uploaded_once(backend) -> None:
    thetas, spans, clock = [torch.ones(300)], [Span(1)], torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        update(backend, thetas, spans, clock, [(0, 0), (0, 1), (0, 2)])
        clock += 1
    assert backend.tables.built == 2  # the list's and the names'


CHANGES = {
    "moved": lambda t, s: ([t[0].clone(), t[1]], s),
    "another dtype": lambda t, s: ([t[0].view(torch.bfloat16), t[1]], s),
    "another shape": lambda t, s: ([t[0][:200], t[1]], s),
    "other strides": lambda t, s: ([t[0], t[1].t()], s),
    "another name": lambda t, s: (t, [s[0]._replace(who=9), s[1]]),
    "another first": lambda t, s: (t, [s[0]._replace(first=8), s[1]]),
    "a pitch": lambda t, s: (t, [s[0], s[1]._replace(pitch=100)]),
    "another order": lambda t, s: (t[::-1], s),
    "fewer": lambda t, s: (t[:1], s[:1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_list_has_another_table(backend, change) -> None:
    thetas, spans = [torch.ones(300), torch.ones(7, 9)], [Span(1), Span(2, 40)]
    same_as_reference(backend, thetas, spans)
    thetas, spans = CHANGES[change](thetas, spans)
    assert device_tables.key_of(thetas, spans) != next(iter(backend.tables.kept))[1]
    same_as_reference(backend, thetas, spans)
    assert backend.tables.built == 2


def test_a_key_without_addresses_is_rejected(backend, monkeypatch) -> None:
    """A table that is found by shapes alone would write to the tensor that was there before."""

    def by_shape(thetas, spans, *others):
        return tuple(t.shape for t in thetas), tuple(spans)

    monkeypatch.setattr(device_tables, "key_of", by_shape)
    thetas, spans = [torch.ones(300)], [Span(1)]
    same_as_reference(backend, thetas, spans)
    with pytest.raises(AssertionError):
        same_as_reference(backend, [t.clone() for t in thetas], spans)


def test_outs_residuals_and_rows_are_part_of_the_key() -> None:
    theta, low = torch.ones(6, 8, dtype=torch.bfloat16), torch.zeros(6, 8, dtype=torch.int16)
    out, other, rows = torch.empty_like(theta), torch.empty_like(theta), torch.tensor([1, 2])
    keys = [
        device_tables.key_of([theta], [Span(1)]),
        device_tables.key_of([theta], [Span(1)], ([out],)),
        device_tables.key_of([theta], [Span(1)], ([other],)),
        device_tables.key_of([theta], [Span(1)], ([out], [other])),
        device_tables.key_of([theta], [Span(1)], ([out],), [low]),
        device_tables.key_of([theta], [Span(1)], ([out],), [low.clone()]),
        device_tables.key_of([theta], [Span(1, rows=rows)], ([out],)),
        device_tables.key_of([theta], [Span(1, rows=rows.clone())], ([out],)),
        device_tables.key_of(None, [Span(1)], ([out],)),
    ]
    assert len(set(keys)) == len(keys)


def get(tables: device_tables.Tables, name: int) -> device_tables.Launch:
    return tables.get(HERE, lambda: name, lambda: ((np.full(4, name),), name))


def test_the_oldest_table_is_dropped_first() -> None:
    tables = device_tables.Tables(tables=3)
    for name in (0, 1, 2, 0, 3):
        assert get(tables, name).facts == name
    assert [key for _, key in tables.kept] == [2, 0, 3] and tables.built == 4
    assert tables.bytes == 3 * 32
    small = device_tables.Tables(bytes=70)
    for name in range(3):
        get(small, name)
    assert [key for _, key in small.kept] == [1, 2] and small.bytes == 64


@pytest.mark.parametrize("limits", [{"tables": 4}, {"bytes": 4 * 32}], ids=str)
def test_more_tensors_than_tables_do_not_thrash(limits: dict) -> None:
    """A step that comes by more lists than there are tables would else find each one just dropped."""
    tables = device_tables.Tables(**limits)
    for _ in range(2):
        for name in range(50):
            get(tables, name)
    built = tables.built
    for _ in range(3):
        for name in range(50):
            get(tables, name)
    assert tables.built == built
    for name in range(100, 200):  # what comes once does not make room for more
        get(tables, name)
    assert len(tables.kept) == 50


def test_streams_have_their_own_uploads(monkeypatch) -> None:
    """The copy to the device is ordered on one stream: another one may not rely on it."""
    tables, stream = device_tables.Tables(), 1
    monkeypatch.setattr(device_tables, "stream_of", lambda device: stream)
    launch = get(tables, 0)
    first = tables.upload(launch)
    assert tables.upload(launch) is first
    stream = 2
    second = tables.upload(launch)
    assert second.places != first.places and tables.built == 1
    stream = 1
    assert tables.upload(launch) is first


def threads_build_one(tables: device_tables.Tables) -> None:
    """Two threads ask for a table that is not there: the second waits, and finds it."""
    inside = Barrier(2)

    def make() -> tuple:
        with suppress(BrokenBarrierError):
            inside.wait(0.2)  # two threads only meet here where both build
        return (np.zeros(4),), None

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(tables.get, HERE, lambda: 0, make) for _ in range(2)]
    assert found[0].result() is found[1].result()
    assert tables.built == 1 and tables.bytes == 32


def test_threads_share_tables() -> None:
    threads_build_one(device_tables.Tables())


def test_tables_without_a_lock_are_rejected() -> None:
    tables = device_tables.Tables()
    tables.lock = nullcontext()
    with pytest.raises(AssertionError):
        threads_build_one(tables)


def test_nothing_is_uploaded_in_a_capture(backend, monkeypatch) -> None:
    thetas, spans, clock = [torch.ones(300)], [Span(1)], torch.zeros(1, dtype=torch.int64)
    update(backend, thetas, spans, clock)
    monkeypatch.setattr(device_tables, "capturing", lambda device: True)
    monkeypatch.setattr(device_tables, "stream_of", lambda device: 7)
    monkeypatch.setattr(
        device_tables, "upload", lambda parts, device: pytest.fail("an upload while a graph is captured")
    )
    update(backend, thetas, spans, clock)
    (launch,) = backend.tables.kept.values()
    assert list(backend.tables.captured.values()) == list(launch.uploads.values())
    with pytest.raises(RuntimeError, match="once before the capture"):
        update(backend, [torch.ones(300)], spans, clock)
    # what a graph reads outlives the cache
    monkeypatch.undo()
    backend.tables.tables = 1
    update(backend, [torch.ones(20)], spans)
    assert len(backend.tables.kept) == 1 and len(backend.tables.captured) == 1


def test_the_same_call_later_gives_another_z(backend) -> None:
    """What a replayed graph does: nothing changes but the number in memory."""
    out, clock = torch.empty(300), torch.zeros(1, dtype=torch.int64)
    seen = []
    for step in range(3):
        backend.draw(Batch([out], [Span(1)]), Noise(NORMAL, SEED, [(0, 0)], clock))
        right = torch.empty(300)
        Reference().draw(Batch([right], [Span(1)]), Noise(NORMAL, SEED, [(step, 0)]))
        equal(out, right, f"z at step {step}")
        seen.append(out.clone())
        clock += 1
    assert backend.tables.built == 1
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_conformance_uses_the_cache(backend) -> None:
    """The suite's repeated launches are compared bit for bit too."""
    conformance.CHECKS["clock"](backend, "cpu", "quick")
    assert 0 < backend.tables.built < 3 * 2 * 4 + 2


# Lists that a caller keeps


@pytest.fixture(params=["cuda on the host", "cpu"])
def either(request) -> backends.Backend:
    """A backend that prepares launches."""
    if request.param == "cpu" and backends.why_off("cpu") is not None:
        pytest.skip(str(backends.why_off("cpu")))
    return backends.get("cpu") if request.param == "cpu" else OnHost(request.getfixturevalue("on_host"))


@pytest.mark.parametrize("check", conformance_kept.CHECKS)
def test_kept_lists_are_the_reference(either, check) -> None:
    assert conformance.run(either, only=[check], checks=conformance_kept.CHECKS) == {check: None}


@pytest.mark.parametrize("kind", conformance_kept.KINDS)
@pytest.mark.parametrize("verb", conformance_kept.VERBS)
def test_kept_lists_are_looked_at_once(backend, monkeypatch, verb, kind) -> None:
    batch, sides = kept_lists(**conformance_kept.KINDS[kind])
    conformance_kept.VERBS[verb](backend, batch, sides, 0, 1)
    looked = []
    for name in ("key_of", "upload"):
        monkeypatch.setattr(device_tables, name, lambda *_: looked.append("a table is made again"))
    monkeypatch.setattr(backend.valid, "device", lambda *_, **__: looked.append("lists are checked again"))
    conformance_kept.VERBS[verb](backend, batch, sides, 1, 1)
    assert not looked


def by_tensors_alone(name, batch, beside, make):
    """lists.prepared() that forgets what lies beside the tensors."""
    found = batch.tensors.kept.setdefault((name, "made"), None) or make()
    batch.tensors.kept[name, "made"] = found
    return found


@pytest.mark.parametrize("check", ["kept_perturb", "kept_update_"])
def test_a_launch_of_other_lists_is_rejected(either, monkeypatch, check) -> None:
    for module in (device_tables, cpu):
        monkeypatch.setattr(module, "prepared", by_tensors_alone)
    found = conformance.run(either, only=[check], checks=conformance_kept.CHECKS)
    assert "AssertionError" in found[check]


WRONG = {  # the numbers of a call on lists that are right
    "float64 coefficients": lambda on, b: on.axpy_(b, noise(0), Terms(numbers(1).double())),
    "two coefficients": lambda on, b: on.axpy_(b, noise(0), Terms(numbers(2))),
    "coefficients elsewhere": lambda on, b: on.axpy_(b, noise(0), Terms(numbers(1, "meta"))),
    "a clock of int32": lambda on, b: on.axpy_(
        b, noise(0)._replace(clock=torch.zeros(1, dtype=torch.int32)), Terms(numbers(1))
    ),
    "a control of two": lambda on, b: on.axpy_(b, noise(0), Terms(numbers(1), control=numbers(2))),
    "a control and each": lambda on, b: on.axpy_(b, noise(0, 2), Terms(numbers(2), 1.0, 1, numbers(3))),
    "another rounding": lambda on, b: on.axpy_(b._replace(rounding="up"), noise(0), Terms(numbers(1))),
    "one out of two": lambda on, b: on.perturb(b, noise(0), [1.0], [b.tensors, b.tensors]),
    "scalars of sign": lambda on, b: on.update_(
        b, noise(0), Update(numbers(1), "adam", numbers(2), [b[0]] * 2)
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_are_checked_at_every_call(either, wrong) -> None:
    backend, (batch, _) = either, kept_lists()
    backend.axpy_(batch, noise(0), Terms(numbers(1)))
    backend.axpy_(batch, noise(0, 2), Terms(numbers(2), control=numbers(3)))
    backend.perturb(batch, noise(0), [1.0, 2.0], [batch.tensors] * 2)
    conformance_kept.update(backend, batch, [batch.tensors] * 2, 0, 1)
    before = [t.clone() for t in batch.tensors]
    with pytest.raises(ValueError, match="expected"):
        WRONG[wrong](backend, batch)
    for a, b in zip(batch.tensors, before):
        equal(a, b, wrong)


def test_lists_that_change_leave_little_behind(backend) -> None:
    batch, _ = kept_lists()
    for _ in range(200):
        backend.perturb(batch, noise(0), [1.0], [TensorList.lasting([torch.empty_like(t) for t in batch[0]])])
    assert len(batch.tensors.kept) <= 64


def product(on, batch: Batch, factors: Outer) -> torch.Tensor:
    on.lowrank_(batch, factors)
    return batch.tensors[0]


def test_lowrank_uploads_once_and_in_no_capture(backend, monkeypatch) -> None:
    """A table that one call made and dropped would be read by every replay of a graph."""
    theta = TensorList.lasting([torch.zeros(16, 24)])
    left, right = (TensorList.lasting([torch.ones(n, 16)]) for n in (16, 24))
    batch, factors = Batch(theta, SpanList([Span(1)])), Outer(left, right, [0.5])
    loose = Batch([torch.zeros(16, 24)], [Span(1)])
    for _ in range(2):
        product(backend, batch, factors)
        product(backend, loose, factors)
    assert backend.tables.built == 2
    monkeypatch.setattr(device_tables, "capturing", lambda device: True)
    monkeypatch.setattr(device_tables, "upload", lambda *_: pytest.fail("an upload in a capture"))
    for one in (batch, loose):
        equal(product(backend, one, factors), torch.full((16, 24), 24.0), "theta")
    assert len(backend.tables.captured) == 2
    for wrong in (factors._replace(scales=[0.25]), factors._replace(lefts=[torch.ones(16, 16)])):
        with pytest.raises(RuntimeError, match="once before the capture"):
            product(backend, batch, wrong)


def test_counts(backend, monkeypatch) -> None:
    """Each is 0, alone in its memory and on 16 bytes, and made for a replay of its own in a capture."""
    counts = device_tables.Counts()
    with torch.inference_mode():
        taken = [counts.take(HERE)]
    taken += [counts.take(HERE) for _ in range(3 * device_tables.COUNTS)]
    for i, count in enumerate(taken):
        assert count.shape == (1,) and count.dtype == torch.int64 and count.data_ptr() % 16 == 0
        count += i
    assert [int(count) for count in taken] == list(range(len(taken)))
    monkeypatch.setattr(device_tables, "capturing", lambda device: True)
    assert counts.take(HERE).untyped_storage().nbytes() == 8


def test_a_device_is_asked_for_its_own_stream(monkeypatch) -> None:
    """Tensors of cuda:1 while cuda:0 is the current device: the stream, and whether it is captured, are those
    of cuda:1."""
    current = [0]

    @contextmanager
    def device(other: torch.device) -> Iterator[None]:
        before, current[0] = current[0], other.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert (device_tables.stream_of(first), device_tables.stream_of(second)) == (70, 71)
    assert (device_tables.capturing(first), device_tables.capturing(second)) == (False, True)
    assert device_tables.stream_of(HERE) == 0 and not device_tables.capturing(HERE) and current == [0]


def test_lists_stand_while_their_tensors_do() -> None:
    tensors = [torch.zeros(3), torch.zeros(3)]
    kept = TensorList.lasting(tensors)
    assert kept.stands(tensors) and kept.stands(list(tensors))
    assert not kept.stands(tensors[:1]) and not kept.stands([tensors[0], tensors[1].clone()])
    tensors[1].data = torch.zeros(3)  # the same object elsewhere
    assert not kept.stands(tensors)


def packs_in_later_steps(backend, rule) -> int:
    """How many tables four steps pack that two steps did not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 1))
    x = torch.randn(4, 6)
    optimizer, before = zokern.MeZO(model, lr=1e-2, rule=rule, evaluation="master", backend=backend), 0
    for step in range(6):
        zokern.step(optimizer, lambda: model(x).square().mean())
        before = backend.tables.built if step == 1 else before
    return backend.tables.built - before


@pytest.mark.parametrize("rule", [zokern.Sgd(), zokern.Momentum(), zokern.Adam()], ids=lambda rule: rule.name)
def test_a_step_packs_nothing_that_the_last_one_had(backend, monkeypatch, rule) -> None:
    assert packs_in_later_steps(backend, rule) == 0
    looked: list[int] = []
    right = device_tables.key_of
    monkeypatch.setattr(device_tables, "key_of", lambda *lists: (looked.append(1), right(*lists))[1])
    packs_in_later_steps(backend, rule)
    assert len(looked) == len({"two sides", "update"})  # of the first step, and of no other


def test_lists_that_nobody_keeps_are_rejected(backend, monkeypatch) -> None:
    monkeypatch.setattr(device_tables, "prepared", lambda name, batch, beside, make: make())
    monkeypatch.setattr(device_tables, "key_of", lambda *lists: object())
    assert packs_in_later_steps(backend, zokern.Adam()) > 0
