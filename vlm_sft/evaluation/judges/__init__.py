"""Compare answers by the verdicts of a judge model behind an OpenAI-compatible endpoint."""
