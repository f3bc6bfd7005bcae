"""LoRA without back-propagation. `python examples/lora.py --model NAME --data FILE`"""

# ruff: noqa: B023 (a step calls its closure before the loop goes on)

import peft
from common import arguments, batches, load

import zokern


def main():
    args = arguments(steps=100, lr=(3e-2, 1e-4), eps=(1e-2, 1e-2))
    model, tokenizer = load(args.model)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()  # eval: no dropout in the losses
    model.print_trainable_parameters()

    opt = zokern.MeZO(model, lr=args.lr, eps=args.eps, seed=0)  # trains what requires a gradient
    data = batches(model, tokenizer, args.data)
    for _, batch in zip(range(args.steps), data):
        result = zokern.step(opt, lambda: model(**batch).loss)
        if result.step % 10 == 0:
            print(f"step {result.step}: loss {result.loss:.4f}, read by {result.evaluation}")
    return model, opt


if __name__ == "__main__":
    main()
