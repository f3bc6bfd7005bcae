"""A method of your own: a difference of fourth order, and an eps that falls along a cosine.

`python examples/custom_method.py --model NAME --data FILE`; zokern/methods has the published ones."""

# ruff: noqa: B023 (a step calls its closure before the loop goes on)

import math

from common import arguments, batches, load

import zokern
from zokern.optimizer import ZerothOrder

# offsets in units of eps, weights that cancel the terms of third order in z: the error is of order eps^4
FOURTH = zokern.Stencil("fourth", (2.0, 1.0, -1.0, -2.0), (-1 / 12, 2 / 3, -2 / 3, 1 / 12))


class FourthOrder(ZerothOrder):
    """c = (8 L(theta + eps z) - 8 L(theta - eps z) - L(theta + 2 eps z) + L(theta - 2 eps z)) / (12 eps)."""

    def __init__(self, params, lr=1e-6, eps=3e-3, queries=1, **options):
        super().__init__(params, lr=lr, eps=eps, estimator=zokern.Spsa(queries, FOURTH), **options)


def main():
    args = arguments(steps=60, lr=(1e-3, 1e-6), eps=(1e-2, 3e-3))
    model, tokenizer = load(args.model)
    opt = FourthOrder(model, lr=args.lr, eps=args.eps, seed=0)
    for step, batch in zip(range(args.steps), batches(model, tokenizer, args.data)):
        for group in opt.param_groups:  # eps is an option of a group, as lr is
            group["eps"] = args.eps * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps)))
        result = zokern.step(opt, lambda: model(**batch).loss)
        if step % 10 == 0:
            print(f"step {step}: loss {result.loss:.4f}, eps {opt.param_groups[0]['eps']:.1e}")
    return model, opt


if __name__ == "__main__":
    main()
