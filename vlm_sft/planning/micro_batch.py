"""The shape of what goes through the model at once: all that memory and FLOPs depend on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Padded records, or one pack of them.

    Attributes:
        rows: Rows of the batch; 1 for a pack.
        length: Tokens a row, image tokens and padding included.
        targets: Supervised tokens of all rows.
        images: Images of all rows.
        records: Records of all rows.
        attended: Sum over the sequences that attend to themselves of their length squared; padded
            rows attend in full.
    """

    rows: int
    length: int
    targets: int
    images: int
    records: int
    attended: int

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.rows * self.length

    @staticmethod
    def padded(lengths: list[int], *, targets: int, images: int) -> "MicroBatch":
        """Records of these lengths, each padded to the longest."""
        rows, longest = len(lengths), max(lengths)
        return MicroBatch(rows, longest, targets, images, rows, rows * longest**2)
