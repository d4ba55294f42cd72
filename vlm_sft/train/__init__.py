"""Training loop, loss, optimizer, checkpoints, metrics; knows no LoRA and no template."""
