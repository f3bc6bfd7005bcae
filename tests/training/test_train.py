"""`python -m zokern train`: it is the plain loop, it goes on to the same bits after an end, its output loads,
and what is wrong is named by its flag."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from folders import TEMPLATE, model_folder, table, texts

import zokern
from zokern import cli, methods
from zokern.training import run as running
from zokern.training.data import Batches, Row, split
from zokern.training.options import parse
from zokern.training.run import CHECKPOINT, LOG, OPTIONS, Run
from zokern.training.tasks import Closure, Words
from zokern.training.words import LabelWords

WORDS = ["--words", "bad=terrible", "good=great", "--template", TEMPLATE]
FAST = ["--steps", "4", "--batch-size", "4", "--lr", "1e-3", "--quiet", "--save-every", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and rows of two labels."""
    folder = tmp_path_factory.mktemp("train")
    model_folder(folder / "model")
    table(folder / "rows.csv")
    return folder


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    files = ["--model", str(place / "model"), "--data", str(place / "rows.csv"), "--output", str(output)]
    return ["train", *files, *FAST, *more]


def train(*given) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # padding rows, large lr
        return cli.main(arguments(*given))


def log(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / LOG).read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder: Path, kind: str = "CausalLM") -> dict[str, torch.Tensor]:
    import transformers

    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_the_plain_loop(place, tmp_path, capsys):
    import transformers

    assert train(place, tmp_path / "out", *WORDS) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    rows, held_out = split([Row(text, int(label == "good")) for text, label in texts(64)], 0.1)
    words = LabelWords(tokenizer, TEMPLATE, ["terrible", "great"])
    batches, opt = Batches(rows, 4, 0), zokern.MeZO(model, lr=1e-3, seed=0)
    losses = []
    for number in range(4):
        inputs, labels = words.batch(batches.at(number))
        losses.append(
            zokern.step(
                opt,
                lambda i=inputs, t=labels: torch.nn.functional.cross_entropy(
                    words.logits(model, i), t, reduction="none"
                ).mean(),
            ).loss
        )
    found = log(tmp_path / "out")
    # (sum of losses times 1) / n and their mean may differ in the last bit
    assert [line["loss"] for line in found if "loss" in line] == pytest.approx(losses, rel=1e-5)
    for name, value in weights(tmp_path / "out").items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6), name
    with torch.no_grad():
        inputs, labels = words.batch(held_out)
        right = (words.logits(model, inputs).argmax(1) == labels).double().mean().item()
    assert found[-1] == {"step": 4, "held_out": {**found[-1]["held_out"], "accuracy": right}}
    assert capsys.readouterr().out == f"MeZO: 4 steps; model, log and options in {tmp_path / 'out'}\n"


# Resuming ---------------------------------------------------------------------------------------------------


def stop_after(monkeypatch, steps: int) -> None:
    """Interrupts a run in the step after so many."""
    take = Run.take

    def interrupted(self, number, log):
        if number == steps:
            log.write('{"step": 4, "loss": 0.')  # a line that was cut short
            log.flush()
            raise KeyboardInterrupt
        return take(self, number, log)

    monkeypatch.setattr(Run, "take", interrupted)


@pytest.mark.parametrize(
    "more",
    [
        WORDS,
        ["--method", "SubZero", "--set", "rank=4", "interval=3", "--eval-every", "1"],
        ["--schedule", "linear", "--task", "text", "--dtype", "bfloat16"],
        ["--lora", "2", "--lr", "auto", *WORDS],
        ["--method", "ZOMuon", "--lr", "auto", *WORDS],
    ],
    ids=["words", "subzero head", "linear text", "lora words", "muon words"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(place, tmp_path, monkeypatch, capsys, more):
    if "--lora" in more:
        pytest.importorskip("peft", reason="peft is not installed: pip install 'zokern[train]'")
    kind = "SequenceClassification" if "SubZero" in more else "CausalLM"
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    assert train(place, through, *more) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(place, stopped, *more) == 130
    assert "--resume goes on from the last checkpoint" in capsys.readouterr().err
    assert train(place, stopped, *more) == 2 and "--resume goes on with it" in capsys.readouterr().err
    saved = ["--config", str(stopped / OPTIONS), "--resume"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["train", *saved]) == 0
    assert log(stopped) == log(through)
    assert same(weights(stopped, kind), weights(through, kind))
    assert not same(weights(stopped, kind), weights(place / "model", kind))


class Small:
    """The pieces of a run, without files of transformers: for checks over all methods."""

    def __init__(self, place: Path, folder: Path, method: str, steps: int, make: type[Run] = Run) -> None:
        import transformers

        given = arguments(place, folder, "--method", method, "--steps", str(steps), *WORDS)
        self.options = parse(given[1:], None)
        model = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
        words = LabelWords(
            transformers.AutoTokenizer.from_pretrained(place / "model"), TEMPLATE, ["terrible", "great"]
        )
        rows = [Row(text, int(label == "good")) for text, label in texts(16)]
        folder.mkdir(exist_ok=True)
        self.run = make(self.options, model, Words(words), rows, [], lambda text: None)

    def train(self) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run.train(lambda steps: _Bar(steps))
        return {name: p.detach().clone() for name, p in self.run.trained().items()}


class _Bar(list):
    def set_postfix_str(self, text):
        pass

    write = set_postfix_str


def check_resume(place: Path, folder: Path, method: str, make: type[Run] = Run) -> None:
    """4 steps, with a checkpoint after 2, end where 2 steps and 2 resumed ones end."""
    through = Small(place, folder / "through", method, 4, make).train()
    Small(place, folder / "half", method, 2, make).train()
    resumed = Small(place, folder / "half", method, 4, make)
    resumed.run.resume(torch.load(folder / "half" / CHECKPOINT, weights_only=True))
    assert resumed.run.optimizer.steps == 2
    assert same(resumed.train(), through)
    assert log(folder / "half") == log(folder / "through") and len(log(folder / "half")) == 4


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_and_resumes(place, tmp_path, method):
    check_resume(place, tmp_path, method)


class WithoutState(Run):
    """A checkpoint of weights and of the step number alone."""

    def save(self):
        kept = self.optimizer.state_dict
        self.optimizer.state_dict = lambda: {**kept(), "state": {}}
        super().save()
        del self.optimizer.state_dict


class OldWeights(Run):
    """Weights of the step before: the checkpoint is written before the step and counts it."""

    def take(self, number, log):
        self.before = {name: p.detach().clone() for name, p in self.trained().items()}
        return super().take(number, log)

    def save(self):
        super().save()
        kept = torch.load(self.folder / CHECKPOINT, weights_only=True)
        torch.save({**kept, "weights": self.before}, self.folder / CHECKPOINT)


class OtherBatches(Run):
    """Batches that begin anew when a run is resumed."""

    def resume(self, kept):
        super().resume(kept)
        self.first = self.optimizer.steps

    first = 0

    def closure(self, number):
        return super().closure(number - self.first)


class WholeLog(Run):
    """Keeps log lines after the checkpoint."""

    def resume(self, kept):
        text = (self.folder / LOG).read_text()
        super().resume(kept)
        (self.folder / LOG).write_text(text + '{"step": 3}\n')


@pytest.mark.parametrize("wrong", [WithoutState, OldWeights, OtherBatches, WholeLog])
def test_a_wrong_checkpoint_is_rejected(place, tmp_path, wrong):
    with pytest.raises(AssertionError):
        check_resume(place, tmp_path, "ZOAdam", wrong)


def test_judging_changes_no_bit(place, tmp_path):
    """SubZero defers its updates; held-out rows are judged with them, and they are deferred again."""
    given = ["--method", "SubZero", "--set", "rank=4", *WORDS, "--save-every", "0"]
    assert train(place, tmp_path / "often", *given, "--eval-every", "1") == 0
    assert train(place, tmp_path / "ends", *given) == 0
    assert same(weights(tmp_path / "often"), weights(tmp_path / "ends"))
    often, ends = (
        [line for line in log(tmp_path / name) if "held_out" in line] for name in ("often", "ends")
    )
    assert [line["step"] for line in often] == [0, 1, 2, 3, 4] and [often[0], often[-1]] == ends


# What a run is made of --------------------------------------------------------------------------------------


def test_adapters_are_written_and_the_base_is_named(place, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'zokern[train]'")
    assert train(place, tmp_path / "out", "--lora", "2", *WORDS) == 0
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and Path(adapter["base_model_name_or_path"]) == (place / "model").resolve()
    found, base = weights(tmp_path / "out"), weights(place / "model")
    assert any("lora" in name for name in found)
    assert all(
        torch.equal(found[n.replace("_proj", "_proj.base_layer")], base[n]) for n in base if "_proj" in n
    )


def test_a_head_has_the_labels_of_the_rows(place, tmp_path):
    import transformers

    assert train(place, tmp_path / "out") == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "bad", 1: "good"} and config.pad_token_id == 0


def test_a_head_of_other_labels_and_an_output_over_the_model_are_refused(place, tmp_path, capsys):
    assert train(place, tmp_path / "out") == 0
    (tmp_path / "three.csv").write_text("text,label\n" + "".join(f"a {n},{n % 3}\n" for n in range(60)))
    more = ["--model", str(tmp_path / "out"), "--data", str(tmp_path / "three.csv")]
    assert train(place, tmp_path / "other", *more) == 2
    assert "its head has 2 labels, and the rows have 3 (0, 1, 2)" in capsys.readouterr().err
    assert train(place, tmp_path / "out", "--model", str(tmp_path / "out")) == 2
    assert "the folder of --model; name another one" in capsys.readouterr().err
    (tmp_path / "odd.csv").write_text("text,label\na,odd\n")
    assert train(place, tmp_path / "other", "--eval-file", str(tmp_path / "odd.csv")) == 2
    assert "odd.csv': line 2 has the label 'odd'; expected one of bad, good" in capsys.readouterr().err


def test_lr_auto_is_what_tune_finds(place, tmp_path):
    import transformers

    assert train(place, tmp_path / "out", "--lr", "auto", *WORDS) == 0
    kept = json.loads((tmp_path / "out" / OPTIONS).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    task = Words(LabelWords(tokenizer, TEMPLATE, ["terrible", "great"]))
    rows, _ = split([Row(text, int(label == "good")) for text, label in texts(64)], 0.1)
    batches = Batches(rows, 4, 0)
    closures = [Closure(task, model, batches.at(n), torch.device("cpu")) for n in range(running.TUNED)]
    found = zokern.tune(zokern.MeZO(model), closures)
    assert (kept["lr"], kept["eps"]) == (found.lr, found.eps)
    assert log(tmp_path / "out")[1]["lr"] == found.lr


def test_linear_lr_falls_to_zero(place, tmp_path):
    assert train(place, tmp_path / "out", "--schedule", "linear") == 0
    assert [line["lr"] for line in log(tmp_path / "out") if "lr" in line] == [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]


def test_a_plot_a_report_and_rows_to_judge_by(place, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'zokern[train]'")
    other = table(tmp_path / "other.csv", 8)
    more = ["--eval-file", str(other), "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "r.json")]
    assert train(place, tmp_path / "out", *more) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"] == {"train": 64, "held_out": 8} and len(report["losses"]) == report["steps"] == 4
    assert [one["rows"] for one in report["held_out"]] == [8, 8] and report["labels"] == ["bad", "good"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# Options ----------------------------------------------------------------------------------------------------


MODEL, DATA = "--model", "--data"
REFUSED = [
    ([MODEL, "nowhere"], "--model is 'nowhere': there is no such folder"),
    ([MODEL, "x.gguf"], "--model is 'x.gguf'; expected a folder"),
    ([MODEL, "."], "--model is '.', which has no config.json"),
    ([DATA, "none.csv"], "--data is 'none.csv': there is no such file"),
    (["--text-column", "body"], "--text-column is 'body'; rows.csv has the columns text, label"),
    (["--label-column", "class"], "--label-column is 'class'; rows.csv has the columns text, label"),
    (["--label-column", "text"], "--label-column is 'text', which has 64 different values"),
    (["--words", "bad=terrible", "--template", TEMPLATE], "--words names the labels bad, and the rows"),
    (["--words", "bad", "good", "--template", TEMPLATE], "--words has 'bad'; expected LABEL=WORD"),
    ([*WORDS[:2], "good=unheard", *WORDS[3:]], "--words has 'unheard', which is 1 tokens of this model, or"),
    ([*WORDS[:2], "good=great film", *WORDS[3:]], "--words has 'great film', which is 2 tokens"),
    ([*WORDS[:2], "good=terrible", *WORDS[3:]], "expected another word for each label"),
    ([*WORDS[:4], "no place"], "--template is 'no place'; expected {}"),
    ([*WORDS, "--max-tokens", "3"], "--max-tokens is 3: a row may have 3 tokens"),
    ([*WORDS, "--task", "head"], "--words goes with --task words"),
    (["--task", "words"], "--task is 'words', which needs --words"),
    (["--held-out", "0.001"], "--held-out is 0.001, which holds out 0 of 64 rows"),
    (["--set", "rnak=4"], "MeZO has no option 'rnak'"),
    (["--resume"], "--resume: "),
]  # fmt: skip


@pytest.mark.parametrize("more, complaint", REFUSED, ids=[" ".join(more)[:40] for more, _ in REFUSED])
def test_what_is_wrong_is_named_by_its_flag(place, tmp_path, capsys, more, complaint):
    assert train(place, tmp_path / "out", *more) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, complaint",
    [
        (["--method", "lozzo"], "argument --method: is 'lozzo'; expected one of AdaMeZO"),
        (["--lr", "fast"], "argument --lr: is 'fast'; expected auto, or a number above 0"),
        (["--steps", "0"], "argument --steps: is 0; expected a whole number from 1 up"),
        (["--held-out", "1"], "argument --held-out: is 1; expected a share"),
        (["--words", "a=b"], "--words needs a --template"),
        (["--plot", "nowhere/p.png"], "--plot is 'nowhere/p.png': the folder"),
        (["--config", "none.toml"], "--config is 'none.toml': there is no such file"),
        (["--device", "tpu9"], "argument --device: is 'tpu9'; expected cpu, cuda or cuda:N"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_a_wrong_flag_ends_with_its_name(place, tmp_path, capsys, more, complaint):
    with pytest.raises(SystemExit) as end:
        train(place, tmp_path / "out", *more)
    assert end.value.code == 2 and complaint in capsys.readouterr().err


def test_a_run_without_checkpoints_is_kept(place, tmp_path, capsys):
    """Its weights and its log are not written over."""
    (tmp_path / LOG).write_text('{"step": 1, "loss": 0.5}\n')
    assert train(place, tmp_path, *WORDS) == 2
    assert "which holds a run; another folder begins a new one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_a_resumed_run_keeps_what_decides_its_bits(place, tmp_path, capsys):
    assert train(place, tmp_path / "out", *WORDS) == 0
    for more, complaint in (
        (["--seed", "1"], "--seed is 1, and the run was begun with 0"),
        (["--batch-size", "2"], "--batch-size is 2, and the run was begun with 4"),
        (["--lr", "1e-4"], "--lr is 0.0001, and the run was begun with 0.001"),
    ):
        assert train(place, tmp_path / "out", *WORDS, *more, "--resume") == 2
        assert complaint in capsys.readouterr().err
    assert train(place, tmp_path / "out", *WORDS, "--steps", "6", "--resume") == 0
    assert [line["step"] for line in log(tmp_path / "out") if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("package, more", [("peft", ["--lora", "2"]), ("matplotlib", ["--plot", "p.png"])])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    place, tmp_path, capsys, monkeypatch, package, more
):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert train(place, tmp_path / "out", *more) == 2
    assert (
        f"{package} is not installed; pip install 'zokern[train]', or pip install {package}"
        in capsys.readouterr().err
    )
