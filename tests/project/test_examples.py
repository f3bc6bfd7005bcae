"""The examples are short, run as they stand, and do what they say: on the tiny model that they make, and on a
folder by `--model`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zokern

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'zokern[hf]'")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
NEEDS = {"lora": "peft", "quantised": "peft", "accelerate_loop": "accelerate", "trainer": "accelerate"}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def run(monkeypatch):
    """run(name, *options): the module of an example and what its main() returned."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models

    def call(name, *options):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        module = importlib.import_module(name)
        return module, module.main()

    yield call
    torch.set_num_threads(threads)
    for name in [*NAMES, "common"]:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A folder with a model and a tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = [*map(str, range(9)), "and", "make", ".", "?", "Where", "is", "the", "river", "A", "B", "C", "D"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>").save_pretrained(
        folder
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(vocabulary),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=1,
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def fall(model, folder=None, **options) -> float:
    """By how much the loss of two batches is below that of the model before training."""
    import common

    before, tokenizer = common.load(folder, **options)
    data = common.batches(model, tokenizer)
    with torch.no_grad():
        return (
            sum(float(before(**batch).loss - model(**batch).loss) for batch in (next(data), next(data))) / 2
        )


def check_frozen(model, folder=None) -> None:
    """The base of an adapted model has the bits that it had, and every adapter has moved."""
    import common

    before, _ = common.load(folder)
    moved = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert moved and all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    kept = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p
        for name, p in model.named_parameters()
    }
    assert all(torch.equal(p, kept[name]) for name, p in before.named_parameters())
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def value(p: torch.Tensor) -> torch.Tensor:
    """Of a quantised weight of torchao, which cannot be compared itself, the numbers that it stands for."""
    return p.dequantize() if type(p).__module__.startswith("torchao") else p


def rise(shown: str) -> float:
    rewards = [float(found) for found in re.findall(r"reward ([\d.]+)", shown)]
    return rewards[-1] - rewards[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_named(name):
    """Under 40 lines of 110 columns, and the README says where it is."""
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 110
    assert f"examples/{name}.py" in (ROOT / "README.md").read_text()


LEARNS = {"lora": 0.02, "accelerate_loop": 0.1, "custom_method": 0.1, "trainer": 0.1, "data_parallel": 0.1}


@pytest.mark.parametrize("name, least", LEARNS.items())
def test_the_loss_falls(run, capsys, name, least):
    _, (model, opt) = run(name)
    assert fall(model) > least and "step 0: loss" in capsys.readouterr().out
    if name == "lora":
        check_frozen(model)


@pytest.mark.parametrize("name", LEARNS)
def test_a_step_of_nothing_is_noticed(run, name):
    _, (model, _) = run(name, "--lr", 0, "--steps", 3)
    assert fall(model) == pytest.approx(0.0, abs=1e-6)
    if name == "lora":
        with pytest.raises(AssertionError):
            check_frozen(model)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("quantised", "resume", "reward_generate")]
)
def test_a_model_by_name(run, saved, name, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("1 and 2 make 3 .\n\n4 and 4 make 8 .\n")
    _, (model, opt) = run(name, "--model", saved, "--data", text, "--steps", 3, "--lr", 1e-2)
    assert type(getattr(model, "base_model", model)).__name__ != "LlamaForCausalLM"
    assert getattr(opt, "optimizer", opt).steps == 3


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_a_quantised_base(run, monkeypatch, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    found = importlib.util.find_spec
    other = {"bitsandbytes": "torchao", "torchao": "bitsandbytes"}[library]
    module, _ = run("quantised", "--steps", 0)
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == other else found(name, *rest)
        )
        _, (start, _) = run("quantised", "--steps", 0)
        _, (model, opt) = run("quantised")
    import common

    data = common.batches(model, common.Bytes())
    with torch.no_grad():
        start(**next(data))  # bitsandbytes packs weights in the first forward
    before = dict(start.named_parameters())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(
        torch.equal(value(before[name]), value(p)) for name, p in model.named_parameters() if name in frozen
    )
    with torch.no_grad():
        fallen = [float(start(**batch).loss - model(**batch).loss) for batch in (next(data), next(data))]
    assert sum(fallen) / 2 > 0.02


def test_ranks_are_equal_under_torchrun():
    """Two processes under gloo. They read other batches: without a group their losses would differ."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(FOLDER / "data_parallel.py"), "--steps", "3"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank}: all ranks are equal: True" in done.stdout for rank in range(2))


def test_a_quantised_base_without_a_library_says_so(run, monkeypatch):
    pytest.importorskip("peft")
    found = importlib.util.find_spec
    missing = ("bitsandbytes", "torchao")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
    )
    with pytest.raises(SystemExit, match="skipped: neither bitsandbytes nor torchao is installed"):
        run("quantised")


def test_a_reward_rises(run, capsys):
    _, (_, opt, reward) = run("reward_generate", "--steps", 16)
    assert rise(capsys.readouterr().out) > 0.05
    assert opt.result.evaluation == "master" and isinstance(reward(), float)


def test_a_reward_that_is_not_followed_is_noticed(run, capsys):
    run("reward_generate", "--lr", 0, "--steps", 11)
    assert rise(capsys.readouterr().out) < 0.05


@pytest.mark.parametrize("folder", [False, True])
def test_a_resumed_run_has_the_bits(run, capsys, saved, folder):
    run("resume", *(["--model", saved] if folder else []))
    assert "equal: True" in capsys.readouterr().out


def test_a_run_that_resumes_wrongly_is_noticed(run, capsys, monkeypatch):
    """A resumed run that forgets its momentum and step number."""
    monkeypatch.setattr(zokern.MeZO, "load_state_dict", lambda self, state: None)
    run("resume")
    assert "equal: False" in capsys.readouterr().out


# The fourth-order difference against the derivative that autograd gives -------------------------------------


def slope_errors(optimizers) -> list[float]:
    """Relative errors of c for a smooth loss whose terms of third order are large; the losses are float64."""
    errors = []
    for make in optimizers:
        w = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 12))

        def loss(w=w):
            return (3.0 * w.double()).sin().sum() + (2.0 * w.double()).exp().sum()

        (gradient,) = torch.autograd.grad(loss(), w)
        z = zokern.draw("normal", w.shape, seed=0, who="w", step=0)
        opt = make([("w", w)], lr=0.0, eps=3e-2, seed=0, evaluation="master")
        slope = float((gradient.double() * z.double()).sum())
        errors.append(abs(zokern.step(opt, loss).coefficients[0] / slope - 1.0))
    return errors


def check_fourth(method) -> None:
    central, fourth = slope_errors([zokern.MeZO, method])
    assert fourth < central / 20


def test_the_fourth_order_difference(run):
    module, _ = run("custom_method", "--steps", 1)
    check_fourth(module.FourthOrder)
    wrong = zokern.Stencil("wrong", (2.0, 1.0, -1.0, -2.0), (1 / 12, 1 / 3, -1 / 3, -1 / 12))
    with pytest.raises(AssertionError):
        check_fourth(lambda params, **options: zokern.MeZO(params, stencil=wrong, **options))


def test_eps_falls_along_a_cosine(run):
    _, (_, opt) = run("custom_method", "--steps", 10, "--eps", 1e-2)
    assert opt.param_groups[0]["eps"] == pytest.approx(
        1e-2 * (0.1 + 0.45 * (1 + torch.tensor(0.9 * torch.pi).cos().item()))
    )
