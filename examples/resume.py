"""A run that is stopped and resumed has the bits of one that goes on: `python examples/resume.py`"""
# ruff: noqa: B023 (a step calls its closure before the loop goes on)

import itertools
import tempfile
from pathlib import Path

import torch
from common import arguments, batches, load

import zokern


def train(args, start, stop, path):
    """Trains from step `start` (not 0: resumes) to `stop`, saves, and returns the weights."""
    model, tokenizer = load(args.model)
    opt = zokern.MeZO(model, lr=args.lr, eps=args.eps, rule=zokern.Momentum(0.9), seed=0)
    if start:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])  # options, seed, step number and momentum
    for batch in itertools.islice(batches(model, tokenizer, args.data), start, stop):
        result = zokern.step(opt, lambda: model(**batch).loss)
        print(f"step {result.step}: loss {result.loss:.4f}")
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, path)
    return model.state_dict()


def main():
    args = arguments(steps=8, lr=(1e-3, 1e-6), eps=(1e-3, 1e-3))
    with tempfile.TemporaryDirectory() as folder:
        train(args, 0, args.steps // 2, Path(folder, "half"))
        resumed = train(args, args.steps // 2, args.steps, Path(folder, "half"))
        through = train(args, 0, args.steps, Path(folder, "whole"))
    print("equal:", all(torch.equal(through[name], resumed[name]) for name in through))


if __name__ == "__main__":
    main()
