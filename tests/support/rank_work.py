"""What ranks in processes of their own do, for tests/parallel."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zokern

EQUAL = ("MeZO", "SubZero", "LOZO", "KerZOO", "FZOO", "PGAP")
STEPS = 20


def equal_bits(rank: int) -> dict[Any, Any]:
    """Runs of four ranks and of the first two, and the bytes that a step hands to the transport."""
    pair, found = dist.new_group([0, 1]), {}
    for method in EQUAL:
        found[4, method] = ranks.train(method, STEPS, lambda step: [rank], group="auto")
        if rank < 2:
            found[2, method] = ranks.train(method, STEPS, lambda step: [rank], group=pair)
    if rank > 1:
        try:
            ranks.train("MeZO", 1, lambda step: [rank], group=pair)
        except ValueError as problem:
            found["outside"] = str(problem)
    found["ddp"] = ranks.train("MeZO", 6, lambda step: [rank], wrap=DistributedDataParallel, group="auto")
    found["points"] = ranks.train(
        "FZOO", 6, lambda step: [0], evaluation="master", group=zokern.Parallel(split="points")
    )
    found["buffers"] = [buffers(rank, seen) for seen in (True, False)]
    found["alone"] = alone(rank)
    found["hangs"] = hangs(rank)
    return found


def buffers(rank: int, seen: bool) -> Any:
    """A wrapped model with buffers, where rank 0 has no point to read in a step. `seen`: the optimizer is
    given the wrapper."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval())
    options = {"lr": 1e-2, "evaluation": "master", "paired_check": 0}
    opt = zokern.MeZO(model if seen else model.module, group=zokern.Parallel(split="points"), **options)
    for step in range(3):
        x = ranks.batch(step, 0)[:, :4]
        zokern.step(opt, lambda x=x: model(x).square().mean())
    return ranks.bits(model)


def alone(rank: int) -> list[str]:
    """What is said of wrapped models without a group: where the optimizer sees the wrapper, and where the
    closure alone does."""
    said = []
    for seen in (True, False):
        model = ranks.net()
        wrapped = DistributedDataParallel(model)
        opt = zokern.MeZO(wrapped if seen else model, lr=1e-2)
        before = ranks.bits(model)
        try:
            zokern.step(opt, ranks.loss_of(wrapped, ranks.batch(0, rank)))
        except RuntimeError as problem:
            said.append(f"{problem}" if ranks.bits(model) == before else "moved")
    return said


def hangs(rank: int) -> Any:
    """What rank 0 meets where rank 1 takes longer than the group's timeout."""
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if rank > 1:
        return None
    model = ranks.net()
    opt = zokern.MeZO(model, lr=1e-2, group=pair)
    try:
        for step in range(4):
            if (rank, step) == (1, 2):
                time.sleep(4)
            before = ranks.bits(model)
            zokern.step(opt, ranks.loss_of(model, ranks.batch(step, rank)))
    except zokern.RankFailed as problem:
        return step, ranks.bits(model) == before, str(problem)


def prepared(rank: int) -> Any:
    """accelerate's loop: the model, the optimizer and the loader that prepare() returns."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    model, rows = ranks.net(), torch.cat([ranks.batch(0, part) for part in range(8)])
    opt = zokern.SubZero(model, lr=1e-3, seed=7, rank=3, interval=6, group="auto")
    model, opt, loader = accelerator.prepare(model, opt, DataLoader(rows, batch_size=ranks.ROWS))
    for x in loader:
        zokern.step(opt, ranks.loss_of(model, x))
    opt.optimizer.flush()
    return type(model).__name__, opt.optimizer.steps, ranks.bits(model)


def trainers(rank: int, folder: str) -> Any:
    """transformers' Trainer on two ranks: alike with a group, and what it says without one."""
    return [trained(f"{folder}/{rank}", parts=1, group="auto"), refusal(f"{folder}/{rank}")]


def refusal(folder: str) -> str:
    try:
        trained(folder, parts=1)
    except ValueError as problem:
        return str(problem)
    return "nothing"


def trained(folder: str, parts: int, **zo: Any) -> Any:
    """Returns the losses of a Trainer's steps and the weights; parts: micro-batches of a step."""
    import transformers

    from zokern.hf import ZerothOrderTrainer

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=17, **shape))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(80).view(16, 5) * 7 % 17]
    args = transformers.TrainingArguments(
        folder, learning_rate=1e-2, max_steps=4, per_device_train_batch_size=2, logging_steps=1,
        gradient_accumulation_steps=parts, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = ZerothOrderTrainer(model, args, train_dataset=rows, zo={"eps": 1e-3, **zo})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


def killed(rank: int, culprit: int, step: int) -> Any:
    """Rank `culprit` is killed in its closure; the others say what they meet, and their weights."""
    model = ranks.net()
    opt = zokern.MeZO(model, lr=1e-3, seed=7, group="auto")
    kept = []
    try:
        for now in range(step + 5):
            closure = ranks.loss_of(model, ranks.batch(now, rank))

            def read(closure=closure, now=now):
                if (rank, now) == (culprit, step):
                    os.kill(os.getpid(), signal.SIGKILL)
                return closure()

            kept.append(ranks.bits(model))
            zokern.step(opt, read)
    except zokern.RankFailed as problem:
        return len(kept) - 1, str(problem), kept[-1] == ranks.bits(model), ranks.bits(model)


def forgets_state(net: nn.Module, opt: Any, saved: dict[str, Any]) -> None:
    """Wrong: goes on from the weights and the step, without the momentum."""
    net.load_state_dict(saved["model"])
    saved["optimizer"]["state"].clear()
    opt.load_state_dict(saved["optimizer"])


def starts_anew(net: nn.Module, opt: Any, saved: dict[str, Any]) -> None:
    """Wrong: goes on from the weights at step 0."""
    net.load_state_dict(saved["model"])
