"""Test a tokenizer with a chat template on sample conversations and report what does not fit."""
