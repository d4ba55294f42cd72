"""Seed the bugs that packing and its loss can have, one at a time: do the fast tests see each?

    scripts/mutate_packing                # every mutant
    scripts/mutate_packing --only prefix  # mutants whose name has "prefix" in it

Each mutant is an exact replacement in a copy of the sources, tried on the tests that are named with
it. The exit code is 1 when one survives.
"""

import sys

from tests.tools.mutation import Mutant, try_mutants

ATTENTION, PACKING = "vlm_sft/model/packed_attention.py", "vlm_sft/data/packing.py"
OF_ATTENTION, OF_PACKS = "tests/model/test_packed_attention.py", "tests/data/test_packing.py"
BATCH, OF_BATCH = "vlm_sft/data/batch.py", "tests/data/test_batch.py"
OF_DATA = "tests/data/test_dataset.py"
ALONE = f"{OF_ATTENTION}::test_a_packed_record_has_the_states_and_gradients_that_it_has_alone"
VARLEN = f"{OF_ATTENTION}::test_variable_length_kernels_compute_the_same_as_sdpa_per_segment"
FLEX = f"{OF_ATTENTION}::test_flex_attention_computes_the_same_as_sdpa_per_segment"
GRADIENT = "tests/train/test_packing.py::test_packing_changes_neither_loss_nor_gradient"
HELD = f"{OF_PACKS}::test_rows_hold_every_record_once_and_never_too_many_tokens"
BALANCED = f"{OF_PACKS}::test_rows_cost_about_the_same_in_tokens_and_images"
KEYS = f"{OF_DATA}::test_records_with_the_same_prefix_have_the_same_prefix_id"

MUTANTS = (
    Mutant(
        "positions are not reset",
        ATTENTION,
        "            torch.arange(keys - length, keys)\n"
        "            for keys, length in zip(self.num_keys, self.lengths, strict=True)\n",
        "            torch.arange(sum(self.lengths))\n            for _ in range(1)\n",
        (ALONE,),
    ),
    Mutant(
        "a branch counts its positions from its own beginning",
        ATTENTION,
        "            torch.arange(keys - length, keys)\n",
        "            torch.arange(0, length)\n",
        (ALONE,),
    ),
    Mutant(
        "a record sees its neighbor",
        ATTENTION,
        "            ancestors.append([*(ancestors[parent] if parent >= 0 else []), number])\n",
        "            ancestors.append([*([number - 1] if number else []), number])\n",
        (ALONE,),
    ),
    Mutant(
        "a branch does not see its prefix",
        ATTENTION,
        "            ancestors.append([*(ancestors[parent] if parent >= 0 else []), number])\n",
        "            ancestors.append([number])\n",
        (ALONE,),
    ),
    Mutant(
        "a branch of a branch sees only the nearer one",
        ATTENTION,
        "            ancestors.append([*(ancestors[parent] if parent >= 0 else []), number])\n",
        "            ancestors.append([*([parent] if parent >= 0 else []), number])\n",
        (ALONE,),
    ),
    Mutant(
        "a branch's mask is aligned with the first key",
        ATTENTION,
        "torch.arange(num_keys - num_queries, num_keys, device=self.device)",
        "torch.arange(0, num_queries, device=self.device)",
        (ALONE,),
    ),
    Mutant(
        "a sliding window is not heeded",
        ATTENTION,
        "        narrow = window if window is not None and window < num_keys else None\n",
        "        narrow = None\n",
        (ALONE,),
    ),
    Mutant(
        "variable-length kernels see the row's keys instead of the branch's",
        ATTENTION,
        "queries if self.key_index is None else self._cumulated(self.num_keys)",
        "queries",
        (VARLEN,),
    ),
    Mutant(
        "variable-length kernels get keys in the row's order",
        ATTENTION,
        "        others = [state.index_select(0, call.layout.key_index) for state in others]\n",
        "        others = [state[: len(call.layout.key_index)] for state in others]\n",
        (VARLEN,),
    ),
    Mutant(
        "FlexAttention sees later tokens",
        ATTENTION,
        "            return (key <= query) & visible",
        "            return visible",
        (FLEX,),
    ),
    Mutant(
        "FlexAttention does not see prefixes",
        ATTENTION,
        "            visible[number, path] = True\n",
        "            visible[number, number] = True\n",
        (FLEX,),
    ),
    Mutant(
        "a branch continues the segment before its prefix",
        BATCH,
        "            parent, prefix_end = len(segments), length + shared - 1\n",
        "            parent, prefix_end = len(segments) - 1, length + shared - 1\n",
        (OF_BATCH,),
    ),
    Mutant(
        "a branch's first label is predicted by the token before it in the row",
        BATCH,
        "                sources[0] = prefix_end\n",
        "",
        (GRADIENT,),
    ),
    Mutant(
        "a packed label is predicted by its own token",
        BATCH,
        "            sources = offsets + (length - 1)\n",
        "            sources = offsets + length\n",
        (GRADIENT,),
    ),
    Mutant(
        "a padded label is predicted by its own token",
        BATCH,
        "    return rows * labels.shape[1] + columns, shifted[rows, columns], rows\n",
        "    return rows * labels.shape[1] + columns + 1, shifted[rows, columns], rows\n",
        (OF_BATCH,),
    ),
    Mutant(
        "a prefix is in the row for every record",
        BATCH,
        "            append(example.input_ids[shared:], parent)\n",
        "            append(example.input_ids, parent)\n",
        (OF_BATCH,),
    ),
    Mutant(
        "every loss is counted for the first record",
        BATCH,
        "torch.full_like(offsets, number)",
        "torch.zeros_like(offsets)",
        (GRADIENT,),
    ),
    Mutant(
        "the padding of a row continues its last record",
        BATCH,
        "        append(torch.full((padding,), pad_token_id), -1)\n",
        "        append(torch.full((padding,), pad_token_id), len(segments) - 1)\n",
        (OF_BATCH,),
    ),
    Mutant(
        "a group of one image is never split over rows",
        PACKING,
        "            if tokens + rest > max_tokens:\n",
        "            if False:\n",
        (HELD,),
    ),
    Mutant(
        "a split group drops the records before the split",
        PACKING,
        "                yield _item(chosen, records)\n                chosen, tokens",
        "                chosen, tokens",
        (HELD,),
    ),
    Mutant(
        "rows may be longer than their capacity",
        PACKING,
        "        while heap and heap[0][2] + items[number].tokens > max_tokens:\n",
        "        while False:\n",
        (HELD,),
    ),
    Mutant(
        "the number of rows is no multiple of the number of ranks",
        PACKING,
        "    return max(1, -(-count // multiple)) * multiple\n",
        "    return max(1, count)\n",
        (HELD,),
    ),
    Mutant(
        "images cost nothing when rows are balanced",
        PACKING,
        "    costs = [item.tokens + image_cost * item.images for item in items]\n",
        "    costs = [float(item.tokens) for item in items]\n",
        (BALANCED,),
    ),
    Mutant(
        "records are distributed in their order",
        PACKING,
        "    by_cost = sorted(range(len(items)), key=lambda number: -costs[number])\n",
        "    by_cost = list(range(len(items)))\n",
        (BALANCED,),
    ),
    Mutant(
        "records that begin alike share the prefix of another image",
        "vlm_sft/data/dataset.py",
        'return hashlib.sha256(array("q", ids).tobytes() + name).digest()[:16]',
        'return hashlib.sha256(array("q", ids).tobytes()).digest()[:16]',
        (KEYS,),
    ),
    Mutant(
        "records of one image share a prefix that is not alike",
        "vlm_sft/data/dataset.py",
        'return hashlib.sha256(array("q", ids).tobytes() + name).digest()[:16]',
        "return hashlib.sha256(name).digest()[:16]",
        (KEYS,),
    ),
    Mutant(
        "a prefix with supervised tokens is shared",
        "vlm_sft/data/dataset.py",
        "    if not unsupervised or end >= len(tokenized.input_ids):\n",
        "    if end >= len(tokenized.input_ids):\n",
        (f"{OF_DATA}::test_a_supervised_prefix_is_not_shared",),
    ),
    Mutant(
        "a record stands among others' first looks at its second",
        "vlm_sft/data/sampler.py",
        "        repetition = repetitions[index] = repetitions.get(index, -1) + 1\n",
        "        repetition = repetitions[index] = 0\n",
        (
            f"{OF_PACKS}::test_records_of_one_prefix_follow_the_first_of_them_and_second_looks_come_apart",
        ),
    ),
    Mutant(
        "each record of a group brings the shared image",
        "vlm_sft/data/loader.py",
        "self._dataset.example(index, first_image=1)",
        "self._dataset.example(index, first_image=0)",
        (GRADIENT,),
    ),
    Mutant(
        "a pack's loss is a mean",
        "vlm_sft/model/loss.py",
        "        return all_losses.sum(), all_losses\n",
        "        return all_losses.mean(), all_losses\n",
        (GRADIENT,),
    ),
    Mutant(
        "only the last chunk's gradient reaches the head",
        "vlm_sft/model/loss.py",
        "                total += grad\n",
        "                total.copy_(grad)\n",
        ("tests/model/test_loss.py",),
    ),
    Mutant(
        "the loss's gradient does not heed what it is multiplied by",
        "vlm_sft/model/loss.py",
        "(g * sum_grad.to(g.dtype) for g in ctx.saved_tensors)",
        "(g * 1.0 for g in ctx.saved_tensors)",
        ("tests/model/test_loss.py",),
    ),
    Mutant(
        "a packed record's noise is that of the whole row",
        "vlm_sft/model/neftune.py",
        "    record = (visible * own).sum(dim=1)",
        "    record = own.sum().expand(len(own))",
        ("tests/model/test_neftune.py",),
    ),
    Mutant(
        "the last MLP's rows come back in other places",
        "vlm_sft/model/last_layer.py",
        "full.index_copy(0, self._positions, output.squeeze(0))",
        "full.index_copy(0, self._positions.flip(0), output.squeeze(0))",
        ("tests/train/test_packing.py",),
    ),
    Mutant(
        "a place that predicts two tokens is computed twice in the last MLP",
        BATCH,
        "        unique_target_positions=torch.unique(torch.cat(positions)),\n",
        "        unique_target_positions=torch.cat(positions),\n",
        ("tests/train/test_packing.py",),
    ),
    Mutant(
        "the model is not asked whether it isolates",
        "vlm_sft/train/packing_check.py",
        "        check_no_leakage(model, backend, device, TOLERANCE[precision])\n",
        "        pass\n",
        ("tests/train/test_packing.py",),
    ),
    Mutant(
        "small leaks are not looked for",
        "vlm_sft/train/packing_check.py",
        "    for number, places in enumerate(OWN):\n",
        "    for number, places in enumerate(()):\n",
        ("tests/train/test_packing.py",),
    ),
)

if __name__ == "__main__":
    sys.exit(try_mutants(sys.argv[1:], MUTANTS, prog="mutate_packing", about=__doc__ or ""))
