"""The command line: what it says without a command, what each command's --help says, and `bench`."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import subprocess
import sys
import time

import pytest
import torch
from folders import model_folder
from models import Tiny

from zokern import backends, cli, methods
from zokern.cli import bench as cli_bench
from zokern.cli.bench import EPS, LR, eager_step, ratio, rounds

CPU = torch.device("cpu")


def test_without_a_command_it_lists_what_there_is(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"    {name} " in said for name in cli.COMMANDS)
    (line,) = [line for line in said.splitlines() if line.startswith("backends: ")]
    on, _, off = line.partition("; off: ")
    assert on.removeprefix("backends: ").split(", ") == [
        name for name in backends.BACKENDS if backends.why_off(name) is None
    ]
    assert all((name in off) == (backends.why_off(name) is not None) for name in backends.BACKENDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_json(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith(f"usage: zokern {command} ") and "--json" in said


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fly"])
    assert end.value.code == 2 and "invalid choice: 'fly'" in capsys.readouterr().err


def test_methods_as_json(capsys, monkeypatch):
    assert cli.main(["methods", "fzoo", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "FZOO" and row["losses"] == 9 and row["arguments"][0][0] == "params"
    two = {name: methods.METHODS[name] for name in ("MeZO", "FZOO")}
    monkeypatch.setattr(methods, "METHODS", two)
    assert cli.main(["methods", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(two)


# bench ------------------------------------------------------------------------------------------------------


def check_rounds(function, monkeypatch) -> None:
    """The cases take turns, warm up once, and their own seconds are kept: by a clock that they move."""
    now, order = [0.0], []

    def case(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            now[0] += seconds * (1 + order.count(name))  # slower in every round

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = function({"a": case("a", 1.0), "b": case("b", 10.0)}, 0.0, CPU)
    assert order == ["a", "b"] * 4
    assert found == {"a": [3.0, 4.0, 5.0], "b": [30.0, 40.0, 50.0]}
    assert ratio(found["b"], found["a"]) == 10.0


def test_cases_take_turns(monkeypatch):
    check_rounds(rounds, monkeypatch)


def one_after_the_other(cases, seconds, device):
    return {name: rounds({name: call}, seconds, device)[name] for name, call in cases.items()}


def cold(cases, seconds, device):
    times = {name: [] for name in cases}
    for _ in range(cli_bench.LEAST):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize("wrong", [one_after_the_other, cold])
def test_wrong_rounds_are_rejected(monkeypatch, wrong):
    with pytest.raises(AssertionError):
        check_rounds(wrong, monkeypatch)


def check_eager(function) -> None:
    """theta - lr c z, with the c of two losses at theta + eps z and theta - eps z, up to rounding."""
    model, ids = Tiny().double(), torch.arange(12).reshape(2, 6)
    reference = copy.deepcopy(model)

    def loss(of) -> torch.Tensor:
        return of(ids).square().mean()

    torch.manual_seed(0)
    zs = [torch.normal(0.0, 1.0, p.shape, dtype=p.dtype) for p in reference.parameters()]
    losses = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            moved = copy.deepcopy(reference)
            for p, z in zip(moved.parameters(), zs):
                p += sign * EPS * z
            losses.append(loss(moved))
        c = (losses[0] - losses[1]).item() / (2 * EPS)
        for p, z in zip(reference.parameters(), zs):
            p -= LR * c * z
    start = copy.deepcopy(model)
    function(list(model.parameters()), lambda: loss(model))
    pairs = list(zip(model.parameters(), reference.parameters(), start.parameters()))
    assert all(torch.allclose(p, q, rtol=0, atol=1e-13) for p, q, _ in pairs)
    assert any(not torch.equal(p, q) for p, _, q in pairs)


def test_the_eager_loop_is_mezo():
    check_eager(eager_step)


@torch.no_grad()
def ascends(parameters, closure):
    eager_step(parameters, lambda: -closure())


@torch.no_grad()
def stays_perturbed(parameters, closure):
    eager_step(parameters, closure)
    torch.manual_seed(0)
    for p in parameters:
        p.data = p.data + EPS * torch.normal(0.0, 1.0, p.shape, dtype=p.dtype)


@pytest.mark.parametrize("wrong", [ascends, stays_perturbed])
def test_a_wrong_eager_loop_is_rejected(wrong):
    with pytest.raises(AssertionError):
        check_eager(wrong)


@pytest.fixture
def quick(monkeypatch):
    """A small tensor for kernels."""
    monkeypatch.setattr(cli_bench, "ROWS", 64)
    monkeypatch.setattr(cli_bench, "COLUMNS", 64)


def test_bench_prints_draws_and_writes(tmp_path, quick, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'zokern[train]'")
    model = model_folder(tmp_path / "model")
    report, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    given = ["--model", str(model), "--length", "4", "--seconds", "0", "--json", str(report)]
    assert cli.main(["bench", *given, "--plot", str(picture)]) == 0
    found, said = json.loads(report.read_text()), capsys.readouterr().out
    assert [row["name"] for row in found["steps"]] == ["MeZO", "SubZero", "MeZO, the eager loop"]
    assert found["kernels"][0]["name"] == "copy" and found["kernels"][0]["over_copy"] == 1.0
    for row in found["steps"]:
        assert row["rounds"] == cli_bench.LEAST and 0 < row["forwards_seconds"] and row["over_forwards"] > 0
        line = next(line for line in said.splitlines() if line.startswith(f"{row['name']}  "))
        assert f" {row['over_forwards']:.2f}" in line
    assert found["steps"][0]["evaluation"] == "paired" and found["model"]["name"] == "model"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_ratio_is_over_two_forwards(tmp_path, monkeypatch):
    """A step of the eager loop has two forwards: with updates that cost nothing it is 1 of its bound."""
    calls = []
    monkeypatch.setattr(cli_bench, "eager_step", lambda parameters, closure: (closure(), closure()))

    def count(cases, seconds, device):
        times = {}
        for name, call in cases.items():
            before = len(calls)
            call()
            times[name] = [float(len(calls) - before)]
        return times

    monkeypatch.setattr(cli_bench, "rounds", count)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(tmp_path / "model")).eval()
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    row = cli_bench.steps("eager", model, torch.ones(1, 4, dtype=torch.int64), 0.0)
    assert row["forwards_seconds"] == row["seconds"] == 2.0 and row["over_forwards"] == 1.0


def test_bench_names_what_is_missing(tmp_path, quick, capsys):
    assert cli.main(["bench", "--model", str(tmp_path)]) == 2
    assert "expected a folder with a config.json" in capsys.readouterr().err
    assert cli.main(["bench", "--json", "nowhere/x.json"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_commands_are_modules_with_a_main():
    for name, (module, summary) in cli.COMMANDS.items():
        found = cli.find(module)
        assert callable(found.main) and summary, name
        assert isinstance(importlib.import_module(module), type(argparse))


@pytest.mark.parametrize("command", [[], ["methods"]])
def test_a_reader_that_ends_early_is_no_error(command: list[str]) -> None:
    """As in `zokern methods | head -1`: no traceback."""
    run = [sys.executable, "-m", "zokern", *command]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert process.stderr.read() == "" and process.wait() == 1  # type: ignore[union-attr]
