"""The account of a run: what each step trained on, and what was left out on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from vlm_sft.data.batch import Batch, LoadError
from vlm_sft.errors import UserError
from vlm_sft.train.metrics import MetricsFile


@dataclass
class Account:
    """Kept alike in every process; the first one writes it down.

    Args:
        record_ids: The dataset's ids, by place.
        accelerator: The run's processes.
        file: `trained.jsonl`, a row for every step; None outside the first process.
        max_quarantined: Records that may turn out broken before the run stops.
        max_skipped: Steps whose update may be left out before the run stops.
        on_quarantine: Told, in the first process, of each record left out.
    """

    record_ids: Sequence[str]
    accelerator: Accelerator
    file: MetricsFile | None
    max_quarantined: int
    max_skipped: int
    on_quarantine: Callable[[LoadError], None]
    quarantined: dict[int, LoadError] = field(default_factory=dict, init=False)
    skipped_steps: int = field(default=0, init=False)
    _met: list[LoadError] = field(default_factory=list, init=False)

    def position(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps of it."""
        faults = [asdict(self.quarantined[index]) for index in sorted(self.quarantined)]
        return {"quarantined": faults, "skipped_steps": self.skipped_steps}

    def restore(self, manifest: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: what was left out stays out, mended or not."""
        self.skipped_steps = int(manifest.get("skipped_steps", 0))
        self._leave_out([LoadError(**plain) for plain in manifest.get("quarantined", [])])

    def usable(self, indices: Sequence[int]) -> list[int]:
        """Those of some records that are not left out."""
        return [index for index in indices if index not in self.quarantined]

    def meet(self, fault: LoadError) -> None:
        """Note a record of the coming step that this process could not load."""
        self._met.append(fault)

    @property
    def num_met(self) -> int:
        """Records of the coming step that this process could not load."""
        return len(self._met)

    def settle(self, num_met: int) -> None:
        """Leave out what any process could not load.

        Args:
            num_met: `num_met` summed over all processes.

        Raises:
            UserError: In every process: more records are broken than may be.
        """
        if not num_met:
            return
        mine, self._met = self._met, []
        found = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        self._leave_out(found)
        if len(self.quarantined) > self.max_quarantined:
            raise UserError(
                f"{len(self.quarantined)} records turned out broken during training, and "
                f"data.max_quarantined is {self.max_quarantined}; the last one: "
                f"{found[-1].message} - run vlm_sft.check to find all of them",
                code="too_many_broken",
            )

    def skip(self, fault: str, *, step: int) -> None:
        """Count a step whose update is left out.

        Raises:
            UserError: More are left out than may be.
        """
        self.skipped_steps += 1
        if self.skipped_steps > self.max_skipped:
            raise UserError(
                f"step {step}: {fault}; {self.max_skipped} updates were left out before, as many "
                "as train.max_skipped_steps allows - lower the learning rate, or look at these "
                "records with vlm_sft.show",
                code="too_many_not_finite",
            )

    def require_planned(self, batches: Sequence[Batch], planned: Sequence[Sequence[int]]) -> None:
        """Compare what was loaded with what the order says.

        Raises:
            RuntimeError: They differ, which is a fault of this program.
        """
        loaded = [list(batch.record_ids) for batch in batches]
        wanted = [[self.record_ids[i] for i in self.usable(chunk)] for chunk in planned]
        if loaded != wanted:
            raise RuntimeError(
                f"the loader gave the records {loaded}, but the step's are {wanted}; this is a "
                "bug: please report it"
            )

    def note(self, step: int, indices: Sequence[int], skipped: str | None) -> None:
        """Write down which records a finished step trained on."""
        if self.file is None:
            return
        row: dict[str, Any] = {"step": step}
        row["records"] = [self.record_ids[index] for index in self.usable(indices)]
        if skipped is not None:
            row["update_left_out"] = skipped
        self.file.write(row)

    def _leave_out(self, faults: Sequence[LoadError]) -> None:
        for fault in sorted(faults, key=lambda fault: fault.index):
            if fault.index in self.quarantined:
                continue
            self.quarantined[fault.index] = fault
            if self.accelerator.is_main_process:
                self.on_quarantine(fault)
