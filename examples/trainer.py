"""transformers' Trainer with zeroth-order steps: its schedule, logs, evaluation and checkpoints.

`python examples/trainer.py --model NAME --data FILE`. The import, the class and `zo=` are all that is new."""

import tempfile

from common import arguments, batches, load
from transformers import TrainingArguments

from zokern.hf import ZerothOrderTrainer


def main():
    args = arguments(steps=60, lr=(1e-3, 1e-6), eps=(1e-3, 1e-3))
    model, tokenizer = load(args.model)
    batch = next(batches(model, tokenizer, args.data, rows=256))
    rows = [dict(zip(batch, row)) for row in zip(*batch.values())]  # a dataset of the user's in its place
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            learning_rate=args.lr,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            logging_steps=10,
            logging_first_step=True,
            save_strategy="no",
            report_to=[],
        )
        zo = dict(method="SubZero", eps=args.eps, rank=8, interval=20)
        trainer = ZerothOrderTrainer(model, options, train_dataset=rows, eval_dataset=rows[:4], zo=zo)
        trainer.train()
        end = trainer.evaluate()["eval_loss"]
    print(f"step 0: loss {trainer.state.log_history[0]['loss']:.4f}, in the end {end:.4f}")
    return model, trainer.optimizer


if __name__ == "__main__":
    main()
