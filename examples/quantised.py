"""Adapters on a base of 4 bits (bitsandbytes) or 8 (torchao). `python examples/quantised.py --model NAME`"""

# ruff: noqa: B023 (a step calls its closure before the loop goes on)

import importlib.util

import peft
import transformers
from common import arguments, batches, load

import zokern


def main():
    args = arguments(steps=100, lr=(3e-2, 1e-4), eps=(1e-2, 1e-2))
    if importlib.util.find_spec("bitsandbytes"):
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    elif importlib.util.find_spec("torchao"):
        torchao = importlib.import_module("torchao.quantization")
        config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        raise SystemExit("skipped: neither bitsandbytes nor torchao is installed (pip install bitsandbytes)")
    model, tokenizer = load(args.model, quantization_config=config)
    adapters = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters).eval()
    data = batches(model, tokenizer, args.data)
    opt = zokern.MeZO(model, lr=args.lr, eps=args.eps, seed=0)  # trains what requires a gradient
    for step, batch in zip(range(args.steps), data):
        result = zokern.step(opt, lambda: model(**batch).loss)
        if step % 10 == 0:
            print(f"step {step}: loss {result.loss:.4f}")
    return model, opt


if __name__ == "__main__":
    main()
