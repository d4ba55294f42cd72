"""Apply the decisions of reviewers to records."""

from dataclasses import dataclass, field

from data_tools.review.decisions import Verdicts
from data_tools.review.sources import Annotations, edited_record, record_content, record_sample
from vlm_sft.data.conversation import Conversation


@dataclass
class Reviews:
    """Decisions of reviewers, and the annotations that edited texts are verified against.

    Attributes:
        unverified: Ids of edited records that have no annotations, so far.
    """

    verdicts: Verdicts
    known: Annotations
    unverified: set[str] = field(default_factory=set)

    def applied(self, record: Conversation, name: str) -> tuple[Conversation, str]:
        """Return a record as it was decided about, and why it is left out; "" if it is not.

        Args:
            record: The record.
            name: Its id in the table, which is unique.
        """
        decision = self.verdicts.of(name, lambda: record_content(record))
        if decision is None or decision.decision == "accept":
            return record, ""
        if decision.decision == "reject" or decision.turns is None:
            return record, f"review: {decision.reason}"
        edited = edited_record(record, decision.turns)
        if self.known.of(edited) is None:
            self.unverified.add(name)
        codes = record_sample(edited, self.known).reasons
        return edited, f"review edit: {codes[0]}" if codes else ""

    def lines(self) -> str:
        """Return the counts in words."""
        text = self.verdicts.lines()
        if self.unverified:
            text += f"\nnot verified: {len(self.unverified):,} edited records without annotations"
        return text
