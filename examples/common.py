"""What the examples share: their options, a causal language model, and batches of text.

`--model` takes a folder or a name on the hub. Without it the model is a Llama of two layers with random
weights that reads bytes, so that every example runs in seconds."""

import argparse
import itertools
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, LlamaConfig, LlamaForCausalLM

SUMS = [f"{a} and {b} make {a + b}." for a in range(1, 5) for b in range(1, 5)]


def arguments(steps, **defaults):
    """Returns the command line's options. A pair of defaults is for the tiny model and a real one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder or hub name of a causal language model")
    parser.add_argument("--data", help="text file, one example a line")
    parser.add_argument("--steps", type=int, default=steps)
    for name in defaults:
        parser.add_argument(f"--{name}", type=float)
    given = parser.parse_args()
    for name, (tiny, real) in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, real if given.model else tiny)
    return given


class Bytes:
    """A tokenizer without a vocabulary: one number for each byte, and 0 for padding."""

    def __call__(self, texts, padding_side="right", **_):
        rows = [list(text.encode()) for text in texts]
        pad = [[0] * (max(map(len, rows)) - len(row)) for row in rows]
        left = padding_side == "left"
        ids = [p + row if left else row + p for row, p in zip(rows, pad)]
        mask = [[int(i > 0) for i in row] for row in ids]
        return BatchEncoding({"input_ids": ids, "attention_mask": mask}, tensor_type="pt")

    def batch_decode(self, rows, **_):
        return [bytes(i for i in row if i).decode(errors="replace") for row in rows.tolist()]


def load(name=None, **options):
    """Returns a model in eval mode and its tokenizer. options: those of from_pretrained."""
    options = {"dtype": torch.float32, **options}
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name, **options).eval(), tokenizer
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=1, eos_token_id=2, **shape))
    model.generation_config.pad_token_id = 0
    if len(options) > 1:  # by way of a folder, as a real model
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval(), Bytes()


def batches(model, tokenizer, path=None, rows=8):
    """Yields batches for ever: input_ids, attention_mask, labels. Of a file's lines, or of sums in words."""
    texts = SUMS if path is None else [line.strip() for line in open(path, encoding="utf-8") if line.strip()]
    lines = itertools.cycle(texts)
    while True:
        part = list(itertools.islice(lines, rows))
        batch = tokenizer(part, return_tensors="pt", padding=True).to(model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
