"""Folders and files that the command line works on: a small language model, and rows with labels."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

GOOD, BAD = ["fine", "lovely", "warm", "bright"], ["dull", "poor", "cold", "grey"]
FILLER = ["a", "the", "plot", "cast", "long", "film", "tale", "scene"]
WORDS = ["<pad>", "<unk>", "this", "is", "terrible", "great", *GOOD, *BAD, *FILLER]
TEMPLATE = "{} this is"


def texts(count: int) -> list[tuple[str, str]]:
    """Returns (text, label): the last word of a text names its label, and every text occurs once."""
    rows = []
    for n in range(count):
        last = (BAD, GOOD)[n % 2][n // 2 % 4]
        text = f"{FILLER[n // 8 % 8]} {FILLER[n // 64 % 8]} {FILLER[n // 512 % 8]} {last}"
        rows.append((text, ("bad", "good")[n % 2]))
    return rows


def table(path: Path, count: int = 64, columns: tuple[str, str] = ("text", "label")) -> Path:
    """Writes texts and labels as CSV."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *texts(count)])
    return path


def model_folder(path: Path) -> Path:
    """Writes a Llama of 2 layers with random weights and a tokenizer of whole words, as save_pretrained does.
    Skips the test where transformers is missing."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'zokern[train]'"
    )
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
