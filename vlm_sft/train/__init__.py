"""Training loop, loss, optimiser, checkpoints, metrics; knows no LoRA and no template."""
