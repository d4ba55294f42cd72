"""Checks that run before training and behind `vlm_sft.check`."""
