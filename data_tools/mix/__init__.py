"""Several sources of records as one training file, in wanted shares."""
