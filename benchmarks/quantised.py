"""Adapters on a frozen base, plain and quantised: what a step costs, what it holds and what it moves.

`python -m benchmarks.quantised` prints a table for the bases whose packages are installed. Needs transformers
and peft. --only NAME ... takes some bases; --batch, --length, --hidden, --layers and --rounds set the size.

The model is a Llama with random weights and LoRA of rank 8 in every linear layer. In each round a float32
forward, a bfloat16 forward, the forward of the base and a step of each evaluation take turns in one process,
and a ratio is the median over the rounds. Seconds are those of the process on its cores, so that others on
the machine count less: set OMP_NUM_THREADS=1. The base is warm: its first forward is not timed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from zokern.modules import inside_of

from .measure import Case, Group

EVALUATIONS = ("master", "scratch", "paired", "inplace", "auto")
LR, EPS, VOCABULARY = 1e-2, 1e-2, 256


@dataclass(frozen=True)
class Base:
    """A way to load a frozen model.

    needs    packages beside transformers and peft
    dtype    of the weights that are not quantised, and of the activations
    options  returns what from_pretrained takes, given the folder of a float32 model"""

    needs: tuple[str, ...]
    dtype: torch.dtype
    options: Callable[[Path], dict[str, Any]] = lambda folder: {}

    @property
    def missing(self) -> list[str]:
        return [name for name in ("transformers", "peft", *self.needs) if find_spec(name) is None]


def _torchao(module: str, config: str, **options: Any) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from transformers import TorchAoConfig

        return {
            "quantization_config": TorchAoConfig(getattr(importlib.import_module(module), config)(**options))
        }

    return make


def _bitsandbytes(**options: Any) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**options)}

    return make


def _gguf(folder: Path) -> dict[str, Any]:
    """Writes the model of the folder as a GGUF file of Q8_0 blocks."""
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in load_file(folder / "model.safetensors").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.dim() > 1 else gguf.GGMLQuantizationType.F32
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # the format has another order of rotary pairs
            heads = weight.view(config.num_attention_heads, 2, -1, weight.shape[1])
            weight = heads.transpose(1, 2).reshape(weight.shape)
        stored = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"gguf_file": "model.gguf"}


INT4 = "torchao.prototype.quantization.int4"  # the int4 of torchao.quantization needs a GPU
BASES: dict[str, Base] = {
    "float32": Base((), torch.float32),
    "bfloat16": Base((), torch.bfloat16),
    "torchao int8": Base(
        ("torchao",), torch.bfloat16, _torchao("torchao.quantization", "Int8WeightOnlyConfig")
    ),
    "torchao int4": Base(
        ("torchao",), torch.bfloat16, _torchao(INT4, "PrototypeInt4WeightOnlyConfig", group_size=32)
    ),
    "bitsandbytes nf4": Base(
        ("bitsandbytes",), torch.bfloat16,
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    ),
    "bitsandbytes int8": Base(("bitsandbytes",), torch.bfloat16, _bitsandbytes(load_in_8bit=True)),
    "GGUF Q8_0": Base(("gguf",), torch.float32, _gguf),
}  # fmt: skip


def load(name: str, hidden: int = 64, layers: int = 2) -> nn.Module:
    """Returns the Llama of a base, by way of a folder, with adapters; in eval mode."""
    import peft
    import transformers

    base = BASES[name]
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, num_attention_heads=4, **shape
        )
        transformers.LlamaForCausalLM(config).save_pretrained(place)
        made = base.options(Path(place))
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=base.dtype, **made)
        adapters = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(1)
        return peft.get_peft_model(model, adapters).eval()


def closure_of(model: Any, batch: int = 2, length: int = 16) -> Callable[[], Tensor]:
    """Returns a function that computes the loss of one batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return lambda: model(input_ids=ids, labels=ids).loss


def frozen(model: nn.Module) -> dict[str, list[Tensor]]:
    """Returns the memory of all parameters and buffers that are not trained, parts of wrappers among them.

    Scales that bitsandbytes keeps in attributes are among them."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.requires_grad:
            continue
        kept = getattr(getattr(tensor, "quant_state", None), "absmax", None)
        parts = [*inside_of(tensor), *([kept] if isinstance(kept, Tensor) else [])]
        found[name] = [part.detach() for part in parts]
    for name, module in model.named_modules():
        if isinstance(scales := getattr(getattr(module, "state", None), "SCB", None), Tensor):
            found[f"{name}.scales"] = [scales]
    return found


def copies(model: nn.Module) -> list[Tensor]:
    return [part.clone() for parts in frozen(model).values() for part in parts]


def busy(call: Callable[[], Any]) -> float:
    """Returns the seconds that a call keeps cores of this process busy."""
    start = time.process_time()
    call()
    return time.process_time() - start


@dataclass
class Line:
    """What was measured of a base. forward: over a float32 one; steps: by evaluation, over two forwards."""

    name: str
    kinds: str
    held: int
    forward: float
    steps: dict[str, str]
    extra: dict[str, int]
    moved: str

    def __str__(self) -> str:
        cells = [self.name, self.kinds, f"{self.held / 2**20:.1f}", f"{self.forward:.2f}"]
        cells += [self.steps[way] for way in EVALUATIONS]
        extra = max(self.extra.values()) / 2**20
        return "| " + " | ".join([*cells, f"{extra:.2f}", self.moved]) + " |"


def measure(name: str, plain: dict[str, Callable[[], Tensor]], rounds: int, size: dict, tokens: dict) -> Line:
    """Times the forward of a base and a step of each evaluation, beside the forwards of plain models."""
    model = load(name, **size)
    loss = closure_of(model, **tokens)
    with torch.no_grad():
        loss()
    before = copies(model)
    cases = [Case(other, torch.no_grad()(call)) for other, call in plain.items()]
    cases.append(Case("forward", torch.no_grad()(loss)))
    steps, extra, learned = {}, {}, []
    for way in EVALUATIONS:
        own = copy.deepcopy(model)
        step, optimizer = closure_of(own, **tokens), zokern.MeZO(own, lr=LR, eps=EPS, evaluation=way)
        try:
            for _ in range(3):
                result = zokern.step(optimizer, step)
        except RuntimeError as problem:
            steps[way] = "refused"
            logging.getLogger(__name__).info("%s %s: %s", name, way, problem)
            continue
        steps[way], extra[way] = result.evaluation, result.scratch_bytes
        learned.append((own, step))
        cases.append(Case(way, lambda o=optimizer, s=step: zokern.step(o, s)))
    group = Group(name, cases, busy)
    for _ in range(rounds + 1):
        group.round()
    for case in cases:
        del case.times[0]
    bound = [2 * t for t in group.by_name["forward"].times]
    for way, read in list(steps.items()):
        if read != "refused":
            ratio = median(t / b for t, b in zip(group.by_name[way].times, bound))
            steps[way] = f"{ratio:.2f}" + (f" ({read})" if way == "auto" else "")
    same = all(
        all(map(torch.equal, before, [part for parts in frozen(own).values() for part in parts]))
        for own, _ in learned
    )
    kinds = sorted({type(p).__name__ for p in model.parameters() if not p.requires_grad} - {"Parameter"})
    return Line(
        name, ", ".join(kinds) or "Parameter", sum(part.nbytes for part in before),
        group.ratio("forward", "float32 forward"), steps, extra,
        "adapters alone" if same else "frozen bytes changed",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(BASES), default=list(BASES))
    for name, default in (("batch", 4), ("length", 16), ("hidden", 512), ("layers", 4), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    size, tokens = (
        {"hidden": given.hidden, "layers": given.layers},
        {"batch": given.batch, "length": given.length},
    )
    plain = {f"{name} forward": closure_of(load(name, **size), **tokens) for name in ("float32", "bfloat16")}
    packages = [f"{p} {version(p)}" for p in ("torch", "torchao", "bitsandbytes", "gguf") if find_spec(p)]
    print(
        f"{', '.join(packages)}; {platform.machine()}, {torch.get_num_threads()} threads; {size}, {tokens}\n"
    )
    head = ["base", "class", "frozen MB", "forward over float32", *EVALUATIONS, "extra MB", "what moves"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in given.only:
        if missing := BASES[name].missing:
            print(f"{name}: not installed: {', '.join(missing)}")
            continue
        print(measure(name, plain, given.rounds, size, tokens), flush=True)


if __name__ == "__main__":
    main()
