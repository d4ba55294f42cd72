"""Vision tower, projector and language model as one module; knows no record and no tokenizer."""
