"""Records in, supervised token sequences and pixels out; knows no model."""
