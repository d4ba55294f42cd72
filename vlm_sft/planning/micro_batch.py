"""The shape of one micro-batch, which determines its memory and FLOPs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """The shape of a padded micro-batch, or of one packed row.

    Attributes:
        rows: Number of rows; 1 if records are packed.
        length: Tokens per row, including image tokens and padding.
        targets: Supervised tokens of all rows.
        images: Images of all rows.
        crops: Their crops, which the vision tower encodes.
        records: Records of all rows.
        attention_pairs: Query-key pairs before the causal mask, which halves them: the sum of the
            squared lengths of the sequences that attend within themselves. A padded row counts
            with its padded length.
    """

    rows: int
    length: int
    targets: int
    images: int
    crops: int
    records: int
    attention_pairs: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows, including padding."""
        return self.rows * self.length

    @staticmethod
    def padded(lengths: list[int], *, targets: int, images: int, crops: int) -> "MicroBatch":
        """Return the shape of records of these lengths, each padded to the longest."""
        rows, longest = len(lengths), max(lengths)
        return MicroBatch(rows, longest, targets, images, crops, rows, rows * longest**2)
