"""An OpenAI-compatible server for checkpoints."""
