"""Checks before training, which `vlm-sft check` also runs."""
