"""A reward on generated text, without a gradient anywhere: the model learns to answer in capitals.

`python examples/reward_generate.py --model NAME`. The closure returns a Python number. Both sides of a step
draw the same random numbers, so sampling needs no care."""

from common import arguments, load

import zokern

PROMPTS = ["Where is the river?", "Who wrote this?", "What is a prime?", "How far is it?"]


def main():
    args = arguments(steps=30, lr=(1e-2, 1e-6), eps=(1e-2, 1e-3))
    model, tokenizer = load(args.model)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    start = batch["input_ids"].shape[1]

    def reward():
        sampled = model.generate(**batch, do_sample=True, num_return_sequences=16, max_new_tokens=8)
        text = "".join(tokenizer.batch_decode(sampled[:, start:], skip_special_tokens=True))
        return sum(letter.isupper() for letter in text) / max(1, len(text))

    # 'auto' takes 'master' where a closure runs several forwards; dead_limit=None: equal rewards are no error
    opt = zokern.MeZO(model, lr=args.lr, eps=args.eps, queries=4, maximize=True, dead_limit=None, seed=0)
    for _ in range(args.steps):
        result = zokern.step(opt, reward)
        if result.step % 5 == 0:
            print(f"step {result.step}: reward {result.loss:.3f}, read by {result.evaluation}")
    return model, opt, reward


if __name__ == "__main__":
    main()
