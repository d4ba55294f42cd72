"""Seed the bugs that resuming has had elsewhere, one at a time: do the fast tests see each?

    scripts/mutate_resume                # every mutant
    scripts/mutate_resume --only lock    # mutants whose name has "lock" in it

Each mutant is an exact replacement in a copy of the sources, tried on the tests that are named with
it. The exit code is 1 when one survives.
"""

import sys

from tests.tools.mutation import Mutant, try_mutants

DATA, TRAIN, STORE = "vlm_sft/data/", "vlm_sft/train/", "vlm_sft/checkpoint/"
CHECKPOINT = "tests/checkpoint/test_store.py"
OPTIM = "tests/train/test_optimizer.py"
RESUME = "tests/test_resume.py"
BIT_FOR_BIT = (
    "tests/test_stages.py::test_stage_2_learns_from_stage_1s_projector_and_resumes_bit_for_bit"
)
SYNCED = f"{CHECKPOINT}::test_all_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name"
READ_BACK = f"{CHECKPOINT}::test_a_save_that_does_not_read_back_leaves_the_one_before"

MUTANTS = (
    Mutant(
        "a checkpoint's files are not synced",
        STORE + "folders.py",
        "    files = hash_files(building)\n    sync_tree(building)\n",
        "    files = hash_files(building)\n",
        (SYNCED,),
    ),
    Mutant(
        "a checkpoint's manifest is not synced",
        "vlm_sft/utils/atomic_files.py",
        "                sync(file.fileno(), path)\n",
        "",
        (SYNCED,),
    ),
    Mutant(
        "a checkpoint's new name is not synced",
        STORE + "folders.py",
        "    sync_folder(folder.parent)  # only now",
        "    # only now",
        (SYNCED,),
    ),
    Mutant(
        "a checkpoint gets its name before its manifest",
        STORE + "folders.py",
        "    write_manifest(building, fields, files)\n",
        "    move_into_place(building, folder, log)\n"
        "    write_manifest(folder, fields, files)\n"
        "    return\n",
        (SYNCED,),
    ),
    Mutant(
        "older checkpoints go before the new one is read back",
        STORE + "store.py",
        "        checkpoint = verify(folder)\n",
        "        self._prune(folder)\n        checkpoint = verify(folder)\n",
        (READ_BACK,),
    ),
    Mutant(
        "the new checkpoint is not read back",
        STORE + "store.py",
        "        checkpoint = verify(folder)\n",
        "        checkpoint = Checkpoint(folder, read_manifest(folder))\n",
        (READ_BACK,),
    ),
    Mutant(
        "damaged checkpoints count among those that are kept",
        STORE + "store.py",
        " if f not in self._damaged and has_manifest(f)]",
        " if has_manifest(f)]",
        (f"{CHECKPOINT}::test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept",),
    ),
    Mutant(
        "the files' hashes are not compared",
        STORE + "format.py",
        "if name in recorded and sha256(path) != recorded[name]:",
        "if False:",
        (f"{CHECKPOINT}::test_a_damaged_newest_is_named_and_the_one_before_is_used",),
    ),
    Mutant(
        "the manifest's own sha256 is not compared",
        STORE + "format.py",
        "if with_checksum(manifest) != text:",
        "if False:",
        (f"{CHECKPOINT}::test_a_flipped_bit_of_the_manifest_itself_is_seen",),
    ),
    Mutant(
        "a file that a library would load is ignored",
        STORE + "format.py",
        "if _would_be_loaded(Path(name)):",
        "if False:",
        (
            f"{CHECKPOINT}::test_a_file_that_a_library_would_load_is_refused_unless_the_manifest_names_it",
        ),
    ),
    Mutant(
        "what a kill leaves is taken for a checkpoint",
        STORE + "folders.py",
        "            delete_tree(leftover)\n",
        '            os.rename(leftover, parent / leftover.name.split(".")[1])\n',
        (f"{CHECKPOINT}::test_what_a_kill_leaves_is_swept_and_never_taken_for_a_checkpoint",),
    ),
    Mutant(
        "a checkpoint that was being replaced is not put back",
        STORE + "folders.py",
        "            rename_folder(old, folder, last=MANIFEST)\n",
        "            remove(old)\n",
        (f"{CHECKPOINT}::test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_one",),
    ),
    Mutant(
        "the oldest checkpoint is taken for the newest",
        STORE + "store.py",
        "reverse=True)",
        "reverse=False)",
        (f"{CHECKPOINT}::test_the_newest_is_found_and_older_ones_are_dropped",),
    ),
    Mutant(
        "a run whose checkpoints are all damaged starts over",
        STORE + "store.py",
        "        if folders:\n",
        "        if False:\n",
        (
            f"{CHECKPOINT}"
            "::test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_silently",
        ),
    ),
    Mutant(
        "a damaged final/ counts as finished",
        STORE + "store.py",
        "return verify(self.final_dir)",
        "return Checkpoint(self.final_dir, read_manifest(self.final_dir))",
        (f"{CHECKPOINT}::test_a_damaged_final_does_not_count_as_finished",),
    ),
    Mutant(
        "a trained tensor that nothing saves goes unnoticed",
        STORE + "store.py",
        "self.group.all_ranks(lambda: require_all_saved(self.trainable, self.components))",
        "pass",
        (f"{CHECKPOINT}::test_a_trainable_tensor_that_is_not_saved_is_named_before_writing",),
    ),
    Mutant(
        "an error of one rank is not raised on the others",
        "vlm_sft/utils/process_group.py",
        "            if error is not None:\n                raise error\n",
        "            pass\n",
        ("tests/train/test_fsdp.py",),
    ),
    Mutant(
        "sharded tensors are read from the first rows on",
        STORE + "shards.py",
        "low, high = max(start, first), min(stop, end)",
        "low, high = max(start, first), min(stop - start, end)",
        ("tests/train/test_fsdp.py",),
    ),
    Mutant(
        "another run's checkpoint is loaded",
        STORE + "store.py",
        "if identity(name, found, checkpoint.folder) == identity(name, expected):",
        "if True:",
        (f"{CHECKPOINT}::test_a_checkpoint_of_another_stage_is_refused",),
    ),
    Mutant(
        "what is saved changes with the training",
        STORE + "snapshot.py",
        '"cpu", copy=True',
        '"cpu"',
        (f"{CHECKPOINT}::test_what_is_saved_is_what_was_when_the_save_began",),
    ),
    Mutant(
        "a failed save in the background is swallowed",
        STORE + "async_save.py",
        "            self._failure = error\n",
        "            pass\n",
        (f"{RESUME}::test_a_save_that_fails_ends_the_run_and_leaves_the_one_before",),
    ),
    Mutant(
        "the optimizer's state is not restored",
        STORE + "optimizer.py",
        "    optimizer.load_state_dict(state)\n",
        "",
        (f"{CHECKPOINT}::test_an_optimizer_resumes_from_its_files_bit_for_bit",),
    ),
    Mutant(
        "8-bit moments are not restored",
        STORE + "optimizer.py",
        "    copy_tensors(found, live, file)\n",
        "",
        (f"{OPTIM}::test_eight_bit_moments_resume_bit_for_bit_and_are_named_if_they_differ",),
    ),
    Mutant(
        "8-bit moments count their steps from 0 again",
        STORE + "optimizer.py",
        '["step"] = int(live[f"step/{name}"])',
        '["step"] = 0',
        (f"{OPTIM}::test_eight_bit_moments_resume_bit_for_bit_and_are_named_if_they_differ",),
    ),
    Mutant(
        "the order starts at the first step again",
        TRAIN + "trainer.py",
        "self.loader.load(self.step,",
        "self.loader.load(0,",
        (BIT_FOR_BIT,),
    ),
    Mutant(
        "the position is off by one",
        TRAIN + "trainer.py",
        "self.step = checkpoints.saved_step\n",
        "self.step = checkpoints.saved_step + bool(checkpoints.saved_step)\n",
        (BIT_FOR_BIT,),
    ),
    Mutant(
        "the schedule starts again",
        TRAIN + "trainer.py",
        "update = self.updater.apply(gradient, self.step,",
        "resumed = getattr(self.checkpoints.resumed_from, 'step', 0)\n"
        "        update = self.updater.apply(gradient, self.step - resumed,",
        (BIT_FOR_BIT,),
    ),
    Mutant(
        "dropout goes on from wherever the generator is",
        TRAIN + "train_step.py",
        "            torch.manual_seed(seed_of(number))\n",
        "            pass\n",
        (BIT_FOR_BIT,),
    ),
    Mutant(
        "dropout is the same in every step",
        TRAIN + "train_step.py",
        "{seed}/{step}/{micro_batch}",
        "{seed}/{micro_batch}",
        (
            "tests/train/test_train_step.py::test_dropout_repeats_itself_for_a_step_and_differs_between_steps",
        ),
    ),
    Mutant(
        "micro-batches weigh the same, however many targets they have",
        TRAIN + "train_step.py",
        "output.loss_sum * scale",
        "output.loss_sum / max(1, batch.num_targets) / len(batches)",
        (
            "tests/train/test_train_step.py::test_micro_batches_and_processes_do_not_change_the_gradient",
        ),
    ),
    Mutant(
        "every epoch has the order of the first",
        DATA + "sampler.py",
        "{purpose}/{seed}/{epoch}",
        "{purpose}/{seed}/0",
        ("tests/data/test_sampler.py",),
    ),
    Mutant(
        "the epoch is not looked at after the first",
        DATA + "sampler.py",
        "if self._cached[0] != epoch:",
        "if False:",
        ("tests/data/test_sampler.py",),
    ),
    Mutant(
        "a frozen part may be another after resuming",
        TRAIN + "run_checkpoints.py",
        'self._frozen = dict(checkpoint.manifest["frozen"])\n',
        "self._frozen = frozen_digests(self._model)\n",
        (f"{RESUME}::test_a_frozen_part_that_is_another_now_is_refused",),
    ),
    Mutant(
        "an update that is not finite is made all the same",
        TRAIN + "update.py",
        "        if problem is None:\n",
        "        if True:\n",
        (f"{RESUME}::test_a_step_with_a_nonfinite_loss_can_be_skipped_and_is_recorded",),
    ),
    Mutant(
        "records that were left out come back",
        TRAIN + "setup.py",
        "        run_log.restore(checkpoints.resumed_from.manifest)\n",
        "        pass\n",
        (f"{RESUME}::test_a_skipped_record_stays_skipped_when_its_image_is_fixed",),
    ),
    Mutant(
        "skipped updates are counted from 0 again",
        TRAIN + "run_log.py",
        'int(manifest.get("skipped_steps", 0))',
        "0",
        ("tests/train/test_run_log.py",),
    ),
    Mutant(
        "what was loaded is not compared with the plan",
        TRAIN + "run_log.py",
        "        if loaded != expected:\n",
        "        if False:\n",
        ("tests/train/test_run_log.py",),
    ),
    Mutant(
        "rows of steps that are done again are kept",
        TRAIN + "metrics.py",
        "<= last_step] if",
        "<= last_step + 1000] if",
        (BIT_FOR_BIT,),
    ),
    Mutant(
        "SIGTERM is ignored",
        TRAIN + "signals.py",
        "        self.received = signal.Signals(number)\n",
        "        return\n",
        (f"{RESUME}::test_a_run_that_is_stopped_saves_and_resumes_to_the_same_result",),
    ),
    Mutant(
        "the data's content is not part of a checkpoint",
        "vlm_sft/train/setup.py",
        "[dataclasses.asdict(content) for content in data.train.contents]",
        "[]",
        (f"{RESUME}::test_two_records_that_changed_places_are_noticed",),
    ),
    Mutant(
        "changed settings are not looked at",
        "vlm_sft/checkpoint/run_dir.py",
        "if not has_checkpoints or not path.exists():",
        "if True:",
        (f"{RESUME}::test_an_allowed_change_is_reported_and_made",),
    ),
    Mutant(
        "the lock is not taken",
        "vlm_sft/checkpoint/run_dir.py",
        'if lock(file.fileno(), Path(file.name), wait=False) == "held_elsewhere":',
        "if False:",
        ("tests/test_stages.py::test_a_second_run_in_one_folder_is_refused",),
    ),
    Mutant(
        "a loader process keeps the lock of its killed run",
        "vlm_sft/checkpoint/run_dir.py",
        "            os.close(descriptor)  # ",
        "            pass  # ",
        (f"{RESUME}::test_a_loader_worker_that_outlives_its_run_does_not_keep_the_lock",),
    ),
)


if __name__ == "__main__":
    sys.exit(try_mutants(sys.argv[1:], MUTANTS, prog="mutate_resume", about=__doc__ or ""))
