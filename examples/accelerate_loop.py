"""accelerate's loop on one process, with micro-batches and a schedule. There is no backward to call.

`python examples/accelerate_loop.py --model NAME --data FILE`"""

# ruff: noqa: B023 (a step calls its closure before the loop goes on)

import torch
from accelerate import Accelerator
from common import arguments, batches, load

import zokern

PARTS = 4  # micro-batches a step: what gradient accumulation is elsewhere


def main():
    args = arguments(steps=60, lr=(1e-3, 1e-6), eps=(1e-3, 1e-3))
    accelerator = Accelerator()
    model, tokenizer = load(args.model)
    opt = zokern.SubZero(model, lr=args.lr, eps=args.eps, rank=8, interval=20, norm="matched", seed=0)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=args.steps)
    model, opt = accelerator.prepare(model, opt)
    data = batches(model, tokenizer, args.data, rows=4)
    for _ in range(args.steps):
        parts = [next(data) for _ in range(PARTS)]  # drawn before the step: every reading sees the same ones
        result = zokern.step(opt, lambda: sum(model(**part).loss for part in parts) / len(parts))
        schedule.step()
        if result.step % 10 == 0:
            accelerator.print(f"step {result.step}: loss {result.loss:.4f}, lr {schedule.get_last_lr()}")
    return model, opt


if __name__ == "__main__":
    main()
