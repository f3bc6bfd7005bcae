"""The demo: its rows, its statistics against known values,
and the whole line on a model of a few thousand weights."""

from __future__ import annotations

import csv
import json
import math
import warnings
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import zokern
from benchmarks.eager_methods.queries import MeZO as EagerMeZO
from examples import demo
from examples.demo import data, significance
from examples.demo.data import Row, read_reviews, split
from examples.demo.report import FIELDS, plot, summary
from examples.demo.training import Batches, Score, Task
from zokern import cli, methods
from zokern.training.words import LabelWords

GOOD, BAD = ["fine", "lovely", "warm", "bright"], ["dull", "poor", "cold", "grey"]
FILLER = ["a", "the", "plot", "cast", "long", "film", "tale", "scene"]


def sentences(count: int) -> list[Row]:
    """Rows whose label is named by their last word; every text once."""
    rows = []
    for n in range(count):
        label = n % 2
        last = (BAD, GOOD)[label][n // 2 % 4]
        rows.append(Row(f"{FILLER[n // 8 % 8]} {FILLER[n // 64 % 8]} {FILLER[n // 512 % 8]} {last}", label))
    return rows


@pytest.fixture
def tiny():
    """(model, words): a Llama of 2 layers with random weights, and a tokenizer of whole words."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'zokern[demo]'"
    )
    pytest.importorskip("tqdm", reason="tqdm is not installed: pip install 'zokern[demo]'")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {
        word: n
        for n, word in enumerate(["<pad>", "<unk>", "this", "is", "terrible", "great", *GOOD, *BAD, *FILLER])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), LabelWords(
        tokenizer, "{} this is", ["terrible", "great"]
    )


# Rows -------------------------------------------------------------------------------------------------------


def check_split(function) -> None:
    """What a split must keep: balanced, no row twice,
    no text on both sides, the same from rows in any order."""
    rows = sentences(100)
    first, again = function(rows, 40), function(rows[::-1], 40)
    assert first == again
    texts = [{row.text.lower() for row in part} for part in first]
    assert [len(part) for part in first] == [len(part) for part in texts] == [60, 40]
    assert not texts[0] & texts[1]
    assert all(sum(row.label for row in part) * 2 == len(part) for part in first)


def test_split() -> None:
    check_split(split)


def in_file_order(rows, n: int) -> data.Split:
    return data.Split(list(rows[n:]), list(rows[:n]))


def overlapping(rows, n: int) -> data.Split:
    right = split(rows, n)
    return data.Split(right.train + right.held_out[:2], right.held_out)


def unbalanced(rows, n: int) -> data.Split:
    ordered = sorted(rows, key=lambda row: (-row.label, row))
    return data.Split(ordered[n:], ordered[:n])


@pytest.mark.parametrize("wrong", [in_file_order, overlapping, unbalanced])
def test_wrong_split_is_rejected(wrong) -> None:
    with pytest.raises(AssertionError):
        check_split(wrong)


@pytest.mark.parametrize("held_out", [0, 3, 100, 1000])
def test_split_refuses(held_out) -> None:
    with pytest.raises(ValueError, match=f"held_out is {held_out}; expected a multiple of 2 from 2 to 98"):
        split(sentences(100), held_out)


def test_reviews_once_and_unambiguous(tmp_path) -> None:
    """Spelling variants are one text; a text with both labels is none; other sources are left out."""
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([
            ["text", "label", "source"],
            ["A  fine film", 1, data.SENTENCES], ["a fine FILM ", 1, data.SENTENCES],
            ["both ways", 0, data.SENTENCES], ["Both ways", 1, data.SENTENCES],
            ["elsewhere", 1, "other"], ["dull", 0, data.SENTENCES],
        ])  # fmt: skip
    assert read_reviews(path) == [Row("A fine film", 1), Row("dull", 0)]


def test_installed_rows() -> None:
    if not _installed(data.REVIEWS_PACKAGE):
        pytest.skip(f"the rows are not installed: pip install --no-deps {data.REVIEWS_PACKAGE}")
    rows = read_reviews()
    parts = split(rows, 300)
    assert len(rows) > 8000 and len({row.text.lower() for row in rows}) == len(rows)
    assert not {row.text.lower() for row in parts.train} & {row.text.lower() for row in parts.held_out}
    assert sum(row.label for row in parts.held_out) == 150


def test_missing_package_names_the_way_out() -> None:
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package-of-zokern"):
        data.installed_file("no-such-package-of-zokern", ".gguf")


def test_batches_are_balanced_and_use_every_row_once_an_epoch() -> None:
    rows = sentences(24)
    batches = Batches(rows, 8, seed=1)
    drawn = [batches.next() for _ in range(3)]
    assert all(sum(row.label for row in batch) == 4 for batch in drawn)
    assert sorted(row for batch in drawn for row in batch) == sorted(rows)
    assert drawn != [Batches(rows, 8, seed=2).next() for _ in range(3)]
    with pytest.raises(ValueError, match="batch is 7"):
        Batches(rows, 7, seed=0)


# Statistics -------------------------------------------------------------------------------------------------


def check_wilson(function) -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert function(successes, trials) == pytest.approx((low, high), abs=5e-5)


def wald(successes: int, trials: int) -> tuple[float, float]:
    share = successes / trials
    half = 1.959964 * math.sqrt(share * (1 - share) / trials)
    return share - half, share + half


def check_mcnemar(function) -> None:
    """Tails of Binomial(n, 1/2) that can be counted by hand."""
    assert function(0, 0) == 1.0
    assert function(1, 0) == 0.5
    assert function(5, 5) == pytest.approx(638 / 1024)
    assert function(8, 2) == pytest.approx(56 / 1024)
    assert function(2, 8) == pytest.approx(1013 / 1024)


def test_wilson() -> None:
    check_wilson(significance.wilson)
    with pytest.raises(ValueError, match="3 of 2"):
        significance.wilson(3, 2)


def test_mcnemar() -> None:
    check_mcnemar(significance.mcnemar)


def test_rise_interval() -> None:
    """By hand: b = 20.5, c = 5.5, n = 102: difference 15/102,
    variance (26 - 225/102) / 102**2. Signs change with the sides."""
    low, high = significance.rise_interval(20, 5, 100)
    half = 1.959964 * math.sqrt(26 - 225 / 102) / 102
    assert (low, high) == pytest.approx((15 / 102 - half, 15 / 102 + half))
    assert significance.rise_interval(5, 20, 100) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    "check, wrong",
    [
        pytest.param(check_wilson, wald, id="wald"),
        pytest.param(check_wilson, lambda k, n: significance.wilson(k, n, z=1.645), id="90 %"),
        pytest.param(
            check_mcnemar,
            lambda b, c: min(1.0, 2 * significance.mcnemar(max(b, c), min(b, c))),
            id="two-sided",
        ),
        pytest.param(
            check_mcnemar,
            lambda b, c: significance.mcnemar(b + 1, c - 1) if c else 0.0,
            id="tail without its end",
        ),
        pytest.param(check_mcnemar, lambda b, c: significance.mcnemar(c, b), id="sides exchanged"),
    ],
)
def test_wrong_statistic_is_rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_score() -> None:
    """Four rows, one wrong; of the four pairs, three are in order.
    Against a worse start: two righted, none wronged."""
    labels = torch.tensor([0, 0, 1, 1])

    def of(*margins: float) -> torch.Tensor:
        return torch.tensor([[1.0, 1.0 + margin] for margin in margins])

    after = Score(0.5, of(-2.0, 1.0, 0.5, 3.0), labels)
    assert (after.accuracy, after.auc) == (0.75, 0.75)
    outcome = after.against(Score(1.0, of(-1.0, 1.0, -1.0, -1.0), labels))
    assert outcome["p_value"] == 0.25 and outcome["rise_interval"] == significance.rise_interval(2, 0, 4)


# The line ---------------------------------------------------------------------------------------------------


def test_label_words_are_one_token(tiny) -> None:
    _, words = tiny
    with pytest.raises(ValueError, match="'very great' is 2 tokens"):
        LabelWords(words.tokenizer, "{}", ["terrible", "very great"])


def test_padding_does_not_change_the_answer(tiny) -> None:
    model, words = tiny
    short, long = Row("fine", 1), Row("a long long tale the cast cold", 0)
    with torch.no_grad():
        both = words.logits(model, words.batch([short, long])[0])
        alone = words.logits(model, words.batch([short])[0])
    torch.testing.assert_close(both[:1], alone)


def test_eager_loop_restores_and_descends() -> None:
    """With lr = 0 the four passes cancel up to rounding; with lr > 0 a linear loss falls by lr c^2."""
    model = torch.nn.Linear(40, 1)
    x = torch.randn(5, 40)
    before = [p.detach().clone() for p in model.parameters()]
    EagerMeZO(list(model.parameters()), lr=0.0, eps=1e-3).step(lambda: model(x).sum(), 3)
    for p, b in zip(model.parameters(), before):
        torch.testing.assert_close(p, b, rtol=0, atol=1e-6)
    loss = model(x).sum().item()
    EagerMeZO(list(model.parameters()), lr=1e-4, eps=1e-3).step(lambda: model(x).sum(), 3)
    assert model(x).sum().item() < loss


def _line(tiny, *arguments: str) -> dict:
    model, words = tiny
    options = demo.parser().parse_args(
        ["--batch", "8", "--held-out", "32", "--rounds", "1", "--quiet", *arguments]
    )
    options.second_seed = options.seed + 1
    return demo.run(model, words, split(sentences(256), options.held_out), options)


def test_report_is_complete(tiny, tmp_path) -> None:
    """Every documented entry is there and nothing else; it is JSON; text and plot can be made of it."""
    report = _line(tiny, "--steps", "3") | {"seconds": 0.0}
    assert set(report) == set(FIELDS)
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))
    promised = [
        "accuracy_before",
        "accuracy_after",
        "loss_before",
        "loss_after",
        "step_seconds",
        "forward_seconds",
        "eager_step_seconds",
        "adamw_step_seconds",
    ]
    assert all(isinstance(report[name], float) for name in promised)
    assert report["peak_extra_bytes"] is None or report["peak_extra_bytes"] < 2**28
    assert report["rows"] == {"train": 224, "held_out": 32} and len(report["training_losses"]) == 3
    assert report["significant"] is False, "three steps at this learning rate cannot teach"
    assert "held-out rows" in summary(report)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'zokern[demo]'")
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_adamw_is_left_out_where_its_memory_is_not_free(tiny, tmp_path) -> None:
    with patch("examples.demo.cost.free_memory", lambda device: 0):
        report = _line(tiny, "--steps", "1") | {"seconds": 0.0}
    assert report["adamw_step_seconds"] is None and report["adamw_peak_extra_bytes"] is None
    assert "its memory is not free" in summary(report)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'zokern[demo]'")
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("name", "method", "forwards"),
    [
        ("subzero", "SubZero", 2),
        ("LOZO", "LOZO", 2),
        ("tezo", "TeZO", 2),
        ("pgap", "PGAP", 2),
        ("Fzoo", "FZOO", 9),
        ("mezo", "MeZO", 2),
    ],
)
def test_every_method_with_its_own_numbers(tiny, name, method, forwards) -> None:
    """Each is the class that was asked for, with its lr and eps; the report and its text name them."""
    built = []
    make = methods.METHODS[method]
    with patch.dict(
        methods.METHODS, {method: lambda *args, **given: built.append(given) or make(*args, **given)}
    ):
        report = _line(tiny, "--steps", "2", "--method", name)
    made = make(torch.nn.Linear(2, 2))
    assert len(built) == 4 and built[0] == {"seed": 0}
    assert report["method"] == report["options"]["method"] == method and report["forwards"] == forwards
    assert [report["options"][key] for key in ("lr", "eps")] == [
        made.param_groups[0][key] for key in ("lr", "eps")
    ]
    assert f"method     {method}, lr {report['options']['lr']:g}" in summary(report | {"seconds": 0.0})
    assert report["loss_after"] != report["loss_before"], (
        "the weights that are judged are those that were trained"
    )


def test_lr_and_eps_that_are_given_are_taken(tiny) -> None:
    report = _line(
        tiny, "--steps", "1", "--method", "lozo", "--lr", "3e-4", "--eps", "2e-3", "--queries", "2"
    )
    assert [report["options"][key] for key in ("lr", "eps")] == [3e-4, 2e-3] and report["forwards"] == 4


def test_unknown_method_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--method", "adam"])
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and f"adam is no method; expected one of {', '.join(methods.METHODS)}" in said.replace("\n", " ")
    )


def test_all_points_of_a_step_are_read_in_one_pass(tiny) -> None:
    """A closure that reads numbers of tensors cannot be mapped, and would be read a point at a time."""
    model, words = tiny

    class Noting(Task):
        def __call__(self) -> torch.Tensor:
            loss = super().__call__()
            self.last = loss.item()
            return loss

    for kind, way in ((Task, "paired"), (Noting, "scratch")):
        optimizer = zokern.MeZO(model, lr=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ways = [zokern.step(optimizer, kind(model, words, sentences(8))).evaluation for _ in range(2)]
        assert ways[-1] == way


def test_both_seeds_start_from_the_same_weights(tiny) -> None:
    """With lr = 0 nothing is learnt: both seeds end where they began,
    so the second did not continue the first."""
    report = _line(tiny, "--steps", "2", "--lr", "0")
    assert report["loss_after"] == report["second_seed"]["loss"] == report["loss_before"]
    assert report["p_value"] == 1.0


def test_the_same_seed_gives_the_same_losses(tiny) -> None:
    model, _ = tiny
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = _line(tiny, "--steps", "4", "--lr", "1e-3")
    model.load_state_dict(start, strict=False)
    again = _line(tiny, "--steps", "4", "--lr", "1e-3")
    assert first["training_losses"] == again["training_losses"] != []
    assert first["loss_after"] == again["loss_after"] != first["loss_before"]


@pytest.mark.parametrize("level, status", [(0.001, 1), (2.0, 0)], ids=["chance", "beyond chance"])
def test_exit_status(tiny, tmp_path, monkeypatch, capsys, level, status) -> None:
    """One step teaches nothing: said in a sentence, with status 1;
    status 0 needs a p-value below the level."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'zokern[demo]'")
    model, words = tiny
    for name, value in {
        "read_reviews": lambda: sentences(96),
        "load_model": lambda: (model, words.tokenizer),
        "LEAST": 1,
        "LEVEL": level,
    }.items():
        monkeypatch.setattr(demo, name, value)
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.png")]
    assert (
        demo.main(["--steps", "1", "--batch", "4", "--held-out", "16", "--rounds", "1", "--quiet", *files])
        == status
    )
    assert ("the rise is not beyond chance" in capsys.readouterr().err) == (status == 1)
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report) == {*report["fields"], "fields"} and report["significant"] == (status == 0)


def test_missing_model_ends_with_a_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setattr(data, "MODEL_PACKAGE", "no-such-package-of-zokern")
    monkeypatch.setattr(demo, "read_reviews", lambda: sentences(64))
    monkeypatch.setattr(demo, "_check", lambda options: None)
    assert demo.main(["--quiet"]) == 2
    assert capsys.readouterr().err == (
        "zokern demo: the package no-such-package-of-zokern is not installed; pip install --no-deps "
        "no-such-package-of-zokern\n"
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--seed", "-1"], "seed is -1"),
        (["--second-seed", "0"], "--second-seed is 0, as --seed"),
        (["--json", "no/such/folder/out.json"], "no/such/folder does not exist"),
    ],
)
def test_refused_before_anything_is_read(arguments, sentence, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(demo, "read_reviews", lambda: pytest.fail("rows were read"))
    assert demo.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_what_is_missing_is_named_at_once_with_commands_that_install_it_all(monkeypatch, capsys) -> None:
    """The extra, which pyproject.toml has, and beside it the model and the rows, which it has not."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(data, "MODEL_PACKAGE", "no-such-package-of-zokern")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    monkeypatch.setattr(demo, "read_reviews", lambda: pytest.fail("rows were read"))
    assert demo.main(["--quiet"]) == 2
    sentence, _, commands = capsys.readouterr().err.strip().partition("; ")
    named = sentence.removeprefix("zokern demo: not installed: ").split(", ")
    missing = {"gguf", "no-such-package-of-zokern"}
    assert missing <= {*named} <= missing | {data.REVIEWS_PACKAGE}
    first, second = commands.split(" && ")
    assert (
        first == f"pip install 'zokern[{data.EXTRA}]'"
        and "gguf" in project["optional-dependencies"][data.EXTRA]
    )
    assert second.split()[-2:] == ["no-such-package-of-zokern", data.REVIEWS_PACKAGE]


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def test_the_command_finds_the_demo_of_a_checkout(monkeypatch, capsys) -> None:
    """`python -m zokern demo` runs it; where zokern is a wheel, it says where the demo is."""
    monkeypatch.setattr(demo, "main", lambda arguments: len(arguments))
    assert cli.main(["demo", "--steps", "3"]) == 2
    monkeypatch.setattr(cli, "ROOT", Path("/nowhere"))
    assert cli.main(["demo"]) == 2
    assert "examples/demo of the source tree" in capsys.readouterr().err
