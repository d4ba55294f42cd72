"""The doctor's examinations: what a tokenizer and a chat template do, found by doing it."""
