"""Convert original LLaVA checkpoints to the layout of transformers."""
