"""A model folder of transformers: read, given adapters, and written for from_pretrained."""

from __future__ import annotations

import importlib
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .tasks import Head, Task, Text, Words
from .words import LabelWords

EXTRA = "pip install 'zokern[train]'"
GGUF = (
    "read it with from_pretrained(..., gguf_file=FILE, quantization_config=transformers.GgufConfig("
    "dequantize=True)) and write it with save_pretrained(FOLDER), and so its tokenizer"
)


def needed(package: str) -> Any:
    """Returns a package that is optional. ModuleNotFoundError names the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise ModuleNotFoundError(f"{missing} is not installed; {EXTRA}, or pip install {missing}") from error


def load(options: Namespace, labels: Sequence[str]) -> tuple[nn.Module, Any]:
    """Returns (model in eval mode, tokenizer) of the folder options.model, with options.lora adapters.

    labels  names of the labels, for a head; options.task 'head' makes one for so many where the folder has
            none, from options.seed

    Raises ValueError for what is no folder of a model, for one without a tokenizer, and for a head of other
    labels; ModuleNotFoundError where a package is missing."""
    folder = Path(options.model)
    if folder.suffix == ".gguf":
        raise ValueError(f"--model is {options.model!r}; expected a folder; {GGUF}")
    if not folder.is_dir():
        raise ValueError(
            f"--model is {options.model!r}: there is no such folder; expected one that save_pretrained "
            "wrote, or a downloaded repository"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--model is {options.model!r}, which has no config.json; expected a folder that save_pretrained "
            "wrote"
        )
    transformers = needed("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    place = str(folder.resolve())  # adapters record it
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        torch.manual_seed(options.seed)  # of a new head, and of adapters
        model = _model(transformers, place, options, labels)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--model is {options.model!r}, and transformers cannot read it: {first}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"--model is {options.model!r}, whose tokenizer has no padding token and none that can stand for "
            "one; set tokenizer.pad_token and save it there"
        )
    if options.task == "head":
        model.config.pad_token_id = tokenizer.pad_token_id
    if options.lora:
        model = _adapted(model, options)
    return model.eval().to(options.device), tokenizer


def _model(transformers: Any, place: str, options: Namespace, labels: Sequence[str]) -> Any:
    dtype = getattr(torch, options.dtype)
    if options.task != "head":
        return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(place)
    has = any("ForSequenceClassification" in name for name in config.architectures or ())
    if has and config.num_labels != len(labels):
        raise ValueError(
            f"its head has {config.num_labels} labels, and the rows have {len(labels)} ({', '.join(labels)})"
        )
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        place,
        dtype=dtype,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: n for n, name in enumerate(labels)},
    )


def _adapted(model: nn.Module, options: Namespace) -> nn.Module:
    """Returns the model with LoRA adapters on all linear layers but the output. Base weights are frozen."""
    peft = needed("peft")
    kind = "SEQ_CLS" if options.task == "head" else "CAUSAL_LM"
    config = peft.LoraConfig(
        r=options.lora,
        lora_alpha=2 * options.lora,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type=kind,
    )
    return peft.get_peft_model(model, config)


def make_task(options: Namespace, tokenizer: Any, labels: Sequence[str]) -> Task:
    """Returns the task that options.task names. ValueError for label words that are not one token, and for
    labels without a word."""
    if options.task == "text":
        return Text(tokenizer, options.max_tokens)
    if options.task == "head":
        return Head(tokenizer, options.max_tokens)
    if "{}" not in options.template:
        raise ValueError(
            f"--template is {options.template!r}; expected {{}} where the text of a row goes, such as "
            "'{} This movie is'"
        )
    given = dict(_pair(one) for one in options.words)
    if set(given) != set(labels):
        raise ValueError(
            f"--words names the labels {', '.join(given)}, and the rows have {', '.join(labels)}; expected a "
            f"word for each: --words {' '.join(f'{name}=WORD' for name in labels)}"
        )
    chosen = [_token(tokenizer, given[name]) for name in labels]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--words is {' '.join(options.words)}; expected another word for each label")
    try:
        return Words(LabelWords(tokenizer, options.template, chosen, options.max_tokens))
    except ValueError as error:
        raise ValueError(f"--max-tokens is {options.max_tokens}: {error}") from error


def _pair(text: str) -> tuple[str, str]:
    name, found, word = text.partition("=")
    if not (found and name and word):
        raise ValueError(f"--words has {text!r}; expected LABEL=WORD")
    return name, word


def _token(tokenizer: Any, word: str) -> str:
    """Returns a label word as it follows the template: with a space before it, or without."""
    counts = {}
    for form in (f" {word}", word):
        ids = tokenizer(form, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return form
        counts[form] = len(ids)
    raise ValueError(
        f"--words has {word!r}, which is {counts[word]} tokens of this model"
        + (", or an unknown one" if 1 in counts.values() else "")
        + "; expected a word of one known token, whose logit stands for the label"
    )


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes the model, or its adapters alone, and the tokenizer into a folder that from_pretrained loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
