"""Fine-tuning of transformers models on rows of a file: what `python -m zokern train` is made of."""
