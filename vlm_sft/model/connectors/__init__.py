"""Connectors: modules from vision features to embeddings of the language model."""
