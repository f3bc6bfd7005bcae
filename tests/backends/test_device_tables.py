"""The tables that the GPU backends keep on the device: built once for a list, never for another one, complete
in a captured graph.

The backends run here on the host: csrc/elementwise.cu through cuda_shim. That a captured graph replays with a
fresh z is the subject of a test that needs a GPU and is still to be written; what it depends on (no upload,
same buffers, a clock in memory) is shown here.
"""

from __future__ import annotations

import conformance
import pytest
import torch
from cuda_backends import OnHost
from guarded import equal

from zokern.backends import Batch, Noise, Span, Terms, device_tables
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
    assert device_tables.key_of(thetas, spans) != next(iter(backend.tables.kept))[0][0]
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


def test_the_oldest_table_is_dropped_first() -> None:
    kept = device_tables.Tables(tables=3)

    def get(name: int) -> device_tables.Kept:
        return kept.get(name, HERE, lambda: ((torch.full((4,), name).numpy(),), name))

    for name in (0, 1, 2, 0, 3):
        assert get(name).facts == name
    assert [key[0][0] for key in kept.kept] == [2, 0, 3] and kept.built == 4
    assert kept.bytes == 3 * 32
    small = device_tables.Tables(bytes=40)
    for name in (0, 1):
        small.get(name, HERE, lambda: ((torch.zeros(4).numpy(),), None))
    assert len(small.kept) == 2
    small.get(2, HERE, lambda: ((torch.zeros(4).numpy(),), None))
    assert len(small.kept) == 2 and small.bytes == 32


def test_streams_have_their_own_uploads(monkeypatch) -> None:
    """The copy to the device is ordered on one stream: another one may not rely on it."""
    kept, stream = device_tables.Tables(), 1
    monkeypatch.setattr(device_tables, "stream_of", lambda device: stream)
    first = kept.get("list", HERE, lambda: ((torch.zeros(4).numpy(),), None))
    stream = 2
    assert kept.get("list", HERE, lambda: ((torch.zeros(4).numpy(),), None)) is not first and kept.built == 2


def test_nothing_is_uploaded_in_a_capture(backend, monkeypatch) -> None:
    thetas, spans, clock = [torch.ones(300)], [Span(1)], torch.zeros(1, dtype=torch.int64)
    update(backend, thetas, spans, clock)
    monkeypatch.setattr(device_tables, "capturing", lambda device: True)
    monkeypatch.setattr(device_tables, "stream_of", lambda device: 7)
    monkeypatch.setattr(
        device_tables, "upload", lambda parts, device: pytest.fail("an upload while a graph is captured")
    )
    update(backend, thetas, spans, clock)
    assert backend.tables.captured == list(backend.tables.kept.values())
    with pytest.raises(RuntimeError, match="once before the capture"):
        update(backend, [torch.ones(300)], spans, clock)
    # what a graph reads outlives the cache
    monkeypatch.undo()
    backend.tables.limits = (1, 0)
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
