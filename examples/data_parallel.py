"""Data parallel: every rank reads batches of its own, and all ranks keep the same weights.

`torchrun --nproc-per-node 2 examples/data_parallel.py --model NAME --data FILE`; alone it is one process"""

# ruff: noqa: B023 (a step calls its closure before the loop goes on)

import os

import torch
from common import arguments, batches, load
from torch import distributed

import zokern


def main():
    args = arguments(steps=60, lr=(1e-3, 1e-6), eps=(1e-3, 1e-3))
    if "RANK" in os.environ:  # under torchrun
        distributed.init_process_group("gloo")
    running = distributed.is_initialized()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if running else (0, 1)
    model, tokenizer = load(args.model)
    opt = zokern.MeZO(model, lr=args.lr, eps=args.eps, seed=0, group="auto")
    for step, batch in zip(range(args.steps * size), batches(model, tokenizer, args.data)):
        if step % size == rank:  # a rank takes its turn; losses are averaged over all of them
            result = zokern.step(opt, lambda: model(**batch).loss)
            if result.step % 10 == 0 and rank == 0:
                print(f"step {result.step}: loss {result.loss:.4f}")
    if running:
        mine, others = torch.cat([p.detach().flatten() for p in model.parameters()]), [None] * size
        distributed.all_gather_object(others, mine)
        print(f"rank {rank}: all ranks are equal: {all(torch.equal(mine, other) for other in others)}")
        distributed.destroy_process_group()
    return model, opt


if __name__ == "__main__":
    main()
