"""Score training records and select a part of them, beside a random part of the same size."""
