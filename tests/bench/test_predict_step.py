"""benchmarks/predict_step.py: operations counted by hand, launches of a step, sums of the model, the page."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
pytest.importorskip("transformers")
from benchmarks import predict, predict_page, predicted  # noqa: E402
from benchmarks import predict_step as steps  # noqa: E402
from benchmarks.recorder import Call  # noqa: E402

H200 = predict.DEVICES[0]
BANDWIDTH = H200.bandwidth * 1e12
# instructions that the memory hides
WORKS = {case.name: predict.Work(Counter(fma=1.0)) for case in (*predict.CASES, *predict.PRODUCTS)}


# A forward --------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(1000, 64), nn.Linear(64, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.up(self.embed(ids)).view(2, 5, 4, 64).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(h, h, h).sum()


def recorded() -> list[steps.Operation]:
    with torch.device("meta"):
        model = Small().bfloat16()
    ids = torch.empty(2, 5, dtype=torch.int64, device="meta")
    with torch.no_grad(), steps.Operations(model.parameters()) as operations:
        with patch.object(nn.functional, "scaled_dot_product_attention", operations.attention):
            model(ids)
    return operations.found


def test_operations_are_those_counted_by_hand() -> None:
    """A lookup moves its rows and not the table; a view moves nothing; attention is one kernel."""
    embedding, up, attention, total = recorded()
    assert (embedding.name, embedding.bytes) == ("embedding", 8 * 10 + 2 * 2 * 10 * 64), (
        "rows are read and written"
    )
    moved = 2 * (10 * 64 + 64 * 256 + 256 + 10 * 256)
    assert up == steps.Operation("addmm", moved, 2 * 10 * 64 * 256, 10, 64 * 256)
    assert attention == steps.Operation("attention", 4 * 2 * 2560, 4 * 2 * 4 * 5 * 5 * 64, 5)
    assert total.name == "sum" and total.flops == 0


def test_time_of_an_operation() -> None:
    """Bytes, flops or the least of a launch; both sides move and multiply twice as much."""
    assert steps.Operation("add", 1000).seconds(H200) == steps.FLOOR
    assert steps.Operation("add", 10**9).seconds(H200, 2) == pytest.approx(2e9 / BANDWIDTH)
    for rows, rate in ((16, 400e12), (4096, 600e12)):
        assert steps.Operation("mm", 1, 10**12, rows).seconds(H200) == pytest.approx(1e12 / rate)


def test_published_models_fit_as_they_should() -> None:
    assert [steps.is_held(name) for name in steps.MODELS] == [True, True, True, False]
    assert steps.weights("Llama-1B") == (1235814400, 146)
    operations = steps.forward("Llama-1B", 1, 16)
    used = sum(operation.weight for operation in operations)
    assert used == pytest.approx(1235814400, rel=1e-3), "every matrix is read once, the tied one in the head"
    assert 400 < len(operations) < 900


# Launches ---------------------------------------------------------------------------------------------------


def check_launches(name: str) -> None:
    found = {method: steps.recorded(name, method) for method in steps.METHODS}
    verbs = {method: [call.verb for call in one.calls] for method, one in found.items()}
    assert verbs == {method: ["perturb", "perturb", "project", "axpy_"] for method in steps.METHODS}
    assert [one.values for one in found.values()] == [0, 0], "values that a step reads"
    assert found["master"].copies == 2 and found["paired"].copies == 0
    master, paired = (one.calls for one in found.values())
    assert {call.elements for call in master if call.verb != "project"} == {steps.weights(name)[0]}
    assert [call.sides for call in paired[:2]] == [2, 2]
    assert sum(call.elements for call in paired[:2]) == paired[3].elements, "of matrices, and of vectors"


@pytest.mark.parametrize("name", ["Llama-1B", "OPT-1.3B"])
def test_launches_do_not_depend_on_layers(name: str) -> None:
    """16 layers and 24."""
    check_launches(name)


def test_copies_at_their_use_have_a_launch_for_each(monkeypatch) -> None:
    """As where the memory does not hold the copies of all matrices. No bound of an index is read."""
    monkeypatch.setattr(steps, "room", lambda name: 2**30)
    found, tokens = steps.recorded("Llama-1B", "paired"), math.prod(steps.CELLS[0])
    single = [call for call in found.calls if call.verb == "perturb" and call.tensors == 1]
    assert len(single) == 16 * 7 + 2, "the matrices of the layers, the head, and rows of the embedding"
    assert single[0].elements == tokens * 2048 and found.values == 0
    with pytest.raises(AssertionError):  # a launch per layer is not what is promised
        check_launches("Llama-1B")


# The sums ---------------------------------------------------------------------------------------------------

HOST = steps.Host(10e-3, {"master": 14e-3, "paired": 9e-3, "loop": 30e-3})
COUNT = steps.weights("Llama-1B")[0]
PERTURB, AXPY = (Call(verb, 5, COUNT, {torch.bfloat16: 4 * COUNT}, 1) for verb in ("perturb", "axpy_"))


def test_a_line_is_the_sum_of_its_parts() -> None:
    cell, count = (16, 256), steps.weights("Llama-1B")[0]
    plain = sum(operation.seconds(H200) for operation in steps.forward("Llama-1B", *cell))
    launched = {"master": steps.Steps([PERTURB, PERTURB, AXPY], copies=2), "paired": steps.Steps([AXPY])}
    row = steps.predicted("Llama-1B", cell, launched, HOST, WORKS, H200)
    update = 4 * count / BANDWIDTH
    assert row.forwards["device"] == pytest.approx(2e3 * plain)
    assert row.forwards["eager"] == pytest.approx(max(10, 2e3 * plain))
    assert row.steps["master"]["device"] == pytest.approx(1e3 * (2 * plain + 5 * update))
    assert row.steps["master"]["eager"] == pytest.approx(4 + max(10, row.steps["master"]["device"]))
    assert row.steps["paired"]["eager"] == pytest.approx(max(9, row.steps["paired"]["device"]))
    many = 2 * len(steps.forward("Llama-1B", *cell)) + 5
    assert row.steps["master"]["graph"] == pytest.approx(
        row.steps["master"]["device"] + 1e3 * (many * steps.GAP + steps.START)
    )
    assert row.ratio("master", "eager") == row.steps["master"]["eager"] / row.forwards["eager"]
    assert row.steps["loop"]["device"] == pytest.approx(1e3 * (2 * plain + 64 * count / BANDWIDTH), rel=1e-3)


def test_a_line_that_leaves_a_part_out_is_seen() -> None:
    """Each part of the model moves the line: launches, their bytes, instructions, host time."""
    cell = (1, 16)

    def line(calls=(PERTURB, AXPY), copies=2, host=HOST, works=WORKS) -> dict[str, float]:
        launched = {"master": steps.Steps(list(calls), copies), "paired": steps.Steps([AXPY])}
        return steps.predicted("Llama-1B", cell, launched, host, works, H200).steps["master"]

    right = line()
    heavy = {case: predict.Work(Counter(fma=1000.0)) for case in WORKS}
    slow = steps.Host(10e-3, {**HOST.steps, "master": 20e-3})
    assert line(calls=(AXPY,))["device"] < right["device"] > line(copies=1)["device"]
    assert line(works=heavy)["device"] > 2 * right["device"] and line(host=slow)["eager"] > right["eager"]


@pytest.mark.parametrize("name", ["master", "paired"])
def test_host_time_is_measured_with_as_many_layers(name: str, monkeypatch) -> None:
    found = {}
    for layers in (1, 6):
        monkeypatch.setitem(steps.LAYERS, "Llama-1B", layers)
        found[layers] = steps.measured("Llama-1B", 2)
    assert found[6].steps[name] > 1.5 * found[1].steps[name] > 0
    assert set(found[6].steps) == {"master", "paired", "loop"} and found[6].forwards > 2 * found[1].forwards


# The page ---------------------------------------------------------------------------------------------------


def test_the_page_and_its_figures(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(steps, "MODELS", ("Llama-1B",))
    monkeypatch.setitem(steps.LAYERS, "Llama-1B", 1)
    rows, parts = steps.rows(WORKS, H200, rounds=1)
    predict_page.write(rows, parts, WORKS, H200, tmp_path)
    text = (tmp_path / predicted.PAGE).read_text()
    assert (
        text.startswith("# Predicted, not measured") and "No time on this page was measured on a GPU" in text
    )
    lines = [line for line in text.splitlines() if line.startswith("| Llama-1B | ")]
    assert len(lines) == len(steps.CELLS) + 2 and "2 perturb" in text
    found = predicted.read(tmp_path)
    assert found == json.loads((tmp_path / predicted.FIGURES).read_text())["figures"]
    row = rows[0]
    assert found["MeZO master Llama-1B 1x16 / forwards"] == row.ratio("master", "eager")
    assert f"{row.ratio('paired', 'graph'):.2f}" in lines[0] and found["axpy_ cuda / copy"] == 100
    assert predicted.read(tmp_path / "nowhere") == {}


def test_the_page_of_the_tree_is_there() -> None:
    """What `make gpu` compares with was written by the command, for every model and batch."""
    text, found = (predicted.RESULTS / predicted.PAGE).read_text(), predicted.read()
    assert "No time on this page was measured on a GPU" in text
    for name in steps.MODELS:
        for batch, length in steps.CELLS:
            assert f"| {name} | {batch} x {length} |" in text
            assert found[f"MeZO paired, graph {name} {batch}x{length} / graph of forwards"] > 1
