"""The training loop, its loss, optimiser, checkpoints and metrics; knows no LoRA and no template."""
