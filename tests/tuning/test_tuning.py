"""Tuning: eps between rounding and curvature,
lr from the expected fall, and an optimizer that is as it was."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

import zokern
from zokern import cli
from zokern.tuning import AGREES, WIDTHS, Tuning, tune

N = 400


class Loss(torch.nn.Module):
    """L = base + slope w + cube sum w^3, float64 from float32 weights, rounded to `dtype` at the end."""

    def __init__(self, slope: float = 1.0, base: float = 1.0, cube: float = 0.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.w = torch.nn.Parameter(0.1 * torch.randn(N, generator=generator))
        self.g = slope * torch.randn(N, generator=generator, dtype=torch.float64)
        self.base, self.cube, self.dtype = base, cube, dtype

    def forward(self, shift: float = 0.0) -> torch.Tensor:
        w = self.w.double()
        return (self.base + shift + self.g @ w + self.cube * w.pow(3).sum()).to(self.dtype)


def expected(model: Loss, first: int, count: int, share: float = 0.02) -> float:
    """share L / mean (g z)^2 from the draws themselves."""
    square = loss = 0.0
    for k in range(first, first + count):
        z = zokern.draw("normal", (N,), seed=0, who="w", step=0, draw=k).double()
        square += float(model.g @ z) ** 2
        loss += float(model())
    return share * loss / square


def check_lr(tuner) -> None:
    model = Loss(slope=0.3)
    opt = zokern.MeZO(model, lr=1.0)
    free = {"reach": math.inf}
    assert tuner(opt, model, **free).lr == pytest.approx(expected(model, 4, 8), rel=1e-3)
    assert tuner(opt, model, probes=20, share=0.1, **free).lr == pytest.approx(
        expected(model, 4, 20, 0.1), rel=1e-3
    )


def check_eps(tuner) -> None:
    """Kept where the losses are smooth; larger where they are coarse; smaller where they are bent."""
    smooth, coarse, bent = Loss(), Loss(base=3e3, dtype=torch.float32), Loss(cube=2e4)
    assert tuner(zokern.MeZO(smooth, lr=0.0), smooth).eps == 1e-3
    assert tuner(zokern.MeZO(coarse, lr=0.0, eps=3e-6), coarse).eps > 9e-6
    assert tuner(zokern.MeZO(bent, lr=0.0, eps=3e-2), bent).eps < 9.6e-3


def check_reach(tuner) -> None:
    """lr changes no weight by more than `reach`, root mean square: reach / |c|, for Adam reach itself; a long
    one bounds nothing."""
    model = Loss(slope=0.3)
    free = tuner(zokern.MeZO(model, lr=1.0), model)
    bound = tuner(zokern.MeZO(model, lr=1.0), model, reach=1e-4)
    assert bound.lr == pytest.approx(1e-4 / math.sqrt(bound.fall), rel=1e-6) and bound.lr < free.lr
    assert tuner(zokern.MeZO(model, lr=1.0), model, reach=1.0).lr == free.lr
    assert tuner(zokern.MeZO(model, lr=1.0, rule=zokern.Adam()), model, reach=1e-4).lr == pytest.approx(1e-4)
    several = tuner(zokern.MeZO(model, lr=1.0, queries=8), model, reach=1e-4)
    # 8 draws are averaged
    assert several.lr == pytest.approx(expected_reach(model, 4, 16, 8, 1e-4), rel=1e-3)


def check_sound_reach(tuner) -> None:
    """By itself lr keeps a step in the eps where slopes hold, and the report says so."""
    bent = Loss(slope=1e-4, cube=0.1)  # a share of the loss is far, and the loss bends before
    found = tuner(zokern.MeZO(bent, lr=1.0, eps=1e-2), bent)
    sound = max(width.eps for width in found.widths if width.is_sound)
    length = found.lr * math.sqrt(found.fall)
    assert sound < max(width.eps for width in found.widths) and length == pytest.approx(sound, rel=1e-6)
    assert found.reach == sound and f"bounded: such a step changes a weight by {sound:.2g}" in str(found)
    assert found.share == pytest.approx(found.lr * found.fall / found.loss) and found.share < 0.02
    near = Loss(slope=0.3)
    free = tuner(zokern.MeZO(near, lr=1.0), near)
    assert free.reach is None and free.share == 0.02 and "bounded" not in str(free)


def expected_reach(model: Loss, first: int, count: int, queries: int, reach: float) -> float:
    """reach / rms of (1/queries) sum_k c_k z_k, from the draws themselves."""
    square = 0.0
    for k in range(first, first + count):
        z = zokern.draw("normal", (N,), seed=0, who="w", step=0, draw=k).double()
        square += float(model.g @ z) ** 2
    return reach / math.sqrt(square / count / queries)


def test_lr() -> None:
    check_lr(tune)


def test_reach() -> None:
    check_reach(tune)
    with pytest.raises(ValueError, match="reach is 0.0"):
        tune(zokern.MeZO(model := Loss()), model, reach=0.0)


def test_sound_reach() -> None:
    check_sound_reach(tune)


def test_a_loss_of_zero_gives_an_lr_of_zero() -> None:
    """There is nothing to take a share of."""
    model = Loss(base=0.0)
    torch.nn.init.zeros_(model.w)
    found = tune(zokern.MeZO(model, lr=1.0), model)
    assert found.lr == 0.0 and found.share == 0.02 and found.reach is None


def test_eps() -> None:
    check_eps(tune)


def test_a_wrapped_optimizer_is_tuned() -> None:
    """As zokern.step takes it; a model is refused by name."""
    accelerate = pytest.importorskip("accelerate")
    model = Loss(slope=0.3)
    opt = zokern.MeZO(model, lr=1.0)
    assert tune(accelerate.Accelerator(cpu=True).prepare(opt), model) == tune(opt, model)
    with pytest.raises(TypeError, match="optimizer is Loss; expected a zokern optimizer"):
        tune(model, model)


def _with(**change):
    """A tuner whose result is changed."""
    return lambda *args, **options: replace(
        found := tune(*args, **options), **{k: f(found) for k, f in change.items()}
    )


@pytest.mark.parametrize(
    "check, wrong",
    [
        pytest.param(check_lr, _with(lr=lambda t: t.lr * math.sqrt(2.0)), id="twice the square"),
        pytest.param(check_lr, _with(lr=lambda t: 0.02 * t.loss / t.fall), id="share is not read"),
        pytest.param(check_lr, lambda opt, f, **o: tune(opt, f, **{**o, "probes": 4}), id="fewer probes"),
        pytest.param(check_reach, lambda opt, f, **o: tune(opt, f), id="reach is not read"),
        pytest.param(
            check_reach,
            lambda opt, f, reach=1.0, **o: replace(t := tune(opt, f), lr=min(t.lr, reach)),
            id="reach of lr",
        ),
        pytest.param(check_sound_reach, lambda opt, f: tune(opt, f, reach=math.inf), id="no bound"),
        pytest.param(check_sound_reach, lambda opt, f: tune(opt, f, reach=1e-5), id="always bounded"),
        pytest.param(check_eps, _with(eps=lambda t: t.old[0]), id="eps always kept"),
        pytest.param(check_eps, _with(eps=lambda t: max(w.eps for w in t.widths)), id="largest eps"),
        pytest.param(
            check_eps, _with(eps=lambda t: min(t.widths, key=lambda w: w.change).eps), id="eps never kept"
        ),
    ],
)
def test_a_wrong_tuner_is_rejected(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_weights_that_do_not_move_ask_for_a_larger_eps() -> None:
    wide = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tune(zokern.MeZO(wide, lr=0.0, eps=1e-4), lambda: wide.weight.double().sum().exp())
    swallowed = [width.swallowed for width in found.widths]
    assert (
        swallowed == sorted(swallowed, reverse=True) and swallowed[0] > 0.9 and not found.widths[0].is_sound
    )
    assert found.eps >= 9e-4


METHODS = {
    "MeZO": zokern.MeZO, "SubZero": zokern.SubZero, "LOZO-M": lambda m,
    **o: zokern.LOZO(m, momentum=0.9, **o),
    "PGAP": zokern.PGAP, "FZOO": zokern.FZOO, "Bayesian": lambda m,
    **o: zokern.MeZO(m, estimator=zokern.Bayesian(), **o),
    "Blockwise": lambda m, **o: zokern.MeZO(m, estimator=zokern.Blockwise(), **o),
    "Adam": lambda m, **o: zokern.MeZO(m, rule=zokern.Adam(), **o),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_run_that_follows_has_the_same_bits(name) -> None:
    torch.manual_seed(1)
    start = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
    x, weights = torch.randn(8, 12), []
    for tunes in (False, True):
        model = copy.deepcopy(start)
        opt = METHODS[name](model, lr=1e-3)

        def loss(model=model) -> torch.Tensor:
            return (model(x) - 1.0).square().mean()

        for step in range(4):
            if tunes and step in (0, 2):
                opt.flush()
                found = tune(opt, [loss, lambda: 1.1 * loss()])
                assert found.lr > 0.0 and found.eps in [w.eps for w in found.widths] and opt.steps == step
            elif step == 2:
                opt.flush()
            zokern.step(opt, loss)
        weights.append([p.detach().clone() for p in model.parameters()])
        assert opt.param_groups[0]["lr"] == 1e-3 and not opt.guards.force
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_a_rule_of_one_length_gets_its_lr_times_the_coefficients() -> None:
    model = Loss(slope=0.3)
    sgd, adam = (tune(zokern.MeZO(model, rule=rule, lr=1.0), model) for rule in (None, zokern.Adam()))
    assert adam.lr == pytest.approx(sgd.lr * math.sqrt(adam.fall), rel=1e-6)


class Head(torch.nn.Module):
    """L = 1 + g w + h v: `v` is back-propagated, and far steeper."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.v = Loss(slope=0.3), torch.nn.Parameter(torch.zeros(3))

    def forward(self) -> torch.Tensor:
        return self.below() + 1e3 * self.v.double().sum()


def check_mixed(estimator) -> None:
    """With both parts of one gradient the fall is that of either part, whatever alpha is."""
    model = Loss(slope=0.3)
    for alpha in (0.1, 1.0):
        found = tune(zokern.MeZO(model, lr=1.0, estimator=estimator(alpha)), model)
        assert found.lr == pytest.approx(expected(model, 4, 8), rel=1e-3), alpha


def check_split(estimator) -> None:
    """lr is that of the parameters which are not back-propagated."""
    model = Head()
    found = tune(zokern.MeZO(model, lr=1.0, estimator=estimator(["v"])), model)
    z = [zokern.draw("normal", (N,), seed=0, who="below.w", step=0, draw=k).double() for k in range(4, 12)]
    square = sum(float(model.below.g @ one) ** 2 for one in z) / len(z)
    assert found.lr == pytest.approx(0.02 * float(model().detach()) / square, rel=1e-3)


class Unscaled(zokern.Mixed):
    """Tells the slopes of the zeroth-order part as they are: its own fall alone."""

    def forwards(self, oracle, plan):
        for estimate in super().forwards(oracle, plan):
            yield replace(estimate, slopes=estimate.slopes * self.alpha)


class Unscoped(zokern.Split):
    """Reads all parameters."""

    def forwards(self, oracle, plan):
        return self.inner(oracle, plan)


@pytest.mark.parametrize(
    "check, right, wrong", [(check_mixed, zokern.Mixed, Unscaled), (check_split, zokern.Split, Unscoped)]
)
def test_back_propagated_parts(check, right, wrong) -> None:
    check(right)
    with pytest.raises(AssertionError):
        check(wrong)


def test_every_closure_is_read() -> None:
    model = Loss()
    seen: list[int] = []
    closures = [lambda k=k: seen.append(k) or model(float(k)) for k in range(3)]
    found = tune(zokern.MeZO(model, lr=1.0), closures, probes=6)
    assert [k for k in seen if k] == [1, 1, 2, 2, 1, 1, 2, 2] and found.forwards == len(
        seen
    ) == 5 * 4 * 2 + 12
    assert found.loss == pytest.approx(float(model()) + 1.0, abs=1e-3)


def test_apply_keeps_the_ratios_of_groups() -> None:
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    opt = zokern.MeZO([{"params": [a], "lr": 1e-3}, {"params": [b], "lr": 4e-3, "eps": 2e-3}], lr=1e-3)
    found = tune(opt, lambda: (a + 2 * b).double().sum())
    replace(found, eps=1e-2).apply(opt)
    assert [g["lr"] / found.lr for g in opt.param_groups] == pytest.approx([1.0, 4.0])
    assert [g["eps"] for g in opt.param_groups] == pytest.approx([1e-2, 2e-2])


def test_the_report_says_what_was_found(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    model, said = Loss(), []
    found = tune(zokern.MeZO(model, lr=1.0), model, say=said.append)
    text = str(found)
    assert (
        f"eps {found.eps:.2g} (kept)" in text
        and f"lr {found.lr:.2g} (it was 1)" in text
        and "56 forwards" in text
    )
    assert len(said) == len(WIDTHS) + 8 and "No eps is sound" not in text
    rough = replace(found, widths=tuple(w._replace(change=2 * AGREES) for w in found.widths))
    assert "No eps is sound" in str(rough)
    found.plot(tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").read_bytes()[1:4] == b"PNG"


def test_refusals() -> None:
    model = Loss()
    opt = zokern.MeZO(model, lr=1.0)
    with pytest.raises(TypeError, match="closures is 3"):
        tune(opt, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probes is 1"):
        tune(opt, model, probes=1)
    with pytest.raises(ValueError, match="show no slope"):
        tune(opt, lambda: torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="step in progress"):
        zokern.step(opt, lambda: tune(opt, model).loss)
    assert isinstance(tune(opt, model), Tuning)


def test_the_command(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: n for n, word in enumerate(["<pad>", "<unk>", "one", "two", "three"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    data = tmp_path / "lines.txt"
    data.write_text("one two three\n\ntwo three one\n")
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert (
        cli.main(
            ["tune", "--model", str(tmp_path), "--data", str(data), "--method", "subzero", "--quiet", *files]
        )
        == 0
    )
    out, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert (
        out.startswith("SubZero")
        and report["method"] == "SubZero"
        and report["lr"] > 0
        and (tmp_path / "out.png").exists()
    )
    assert cli.main(["tune", "--model", str(tmp_path)]) == 2
    assert "--model and --data go together" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["MeZO", "KerZOO", "ConMeZO", "MeZOSVRG", "DiZO"])
@pytest.mark.parametrize("steps", [0, 1])
def test_tuning_leaves_what_parts_keep(method, steps) -> None:
    """A run that was tuned in between has the bits of one that was not."""
    ends = []
    for tuned in (False, True):
        model = Loss(slope=0.3)
        opt = zokern.methods.METHODS[method](
            model, lr=1e-4, **({"interval": 1} if method == "MeZOSVRG" else {})
        )
        for step in range(3):
            if tuned and step == steps:
                before = {n: list(s) for n, s in opt.state.items()}
                tune(opt, model)
                assert {n: list(s) for n, s in opt.state.items()} == before
            zokern.step(opt, model)
        ends.append(model.w.detach().clone())
    assert torch.equal(*ends)
