"""Seed the bugs that packing and its loss can have, one at a time: do the fast tests see each?

    scripts/mutate_packing                # every mutant
    scripts/mutate_packing --only prefix  # mutants whose name has "prefix" in it

Each mutant is an exact replacement in a copy of the sources, tried on the tests that are named with
it. The exit code is 1 when one survives.
"""

import sys

from tests.tools.mutation import Mutant, try_mutants

ATTENTION, PACKING = "vlm_sft/model/packed_attention.py", "vlm_sft/data/packing.py"
OF_ATTENTION, OF_PACKS = "tests/model/test_attention.py", "tests/data/test_packing.py"
OF_DATA = "tests/data/test_dataset.py"
ALONE = f"{OF_ATTENTION}::test_a_packed_record_has_the_states_and_gradients_that_it_has_alone"
VARLEN = (
    f"{OF_ATTENTION}::"
    "test_variable_length_kernels_are_told_the_same_as_is_computed_segment_by_segment"
)
FLEX = f"{OF_ATTENTION}::test_flex_attention_is_told_the_same_as_is_computed_segment_by_segment"
GRADIENT = "tests/train/test_packing.py::test_packing_changes_neither_loss_nor_gradient"
HELD = f"{OF_PACKS}::test_packs_hold_every_record_once_and_never_too_many_tokens"
KEYS = f"{OF_DATA}::test_records_that_begin_alike_up_to_their_image_have_one_key"

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
        "            chains.append([*(chains[parent] if parent >= 0 else []), number])\n",
        "            chains.append([*([number - 1] if number else []), number])\n",
        (ALONE,),
    ),
    Mutant(
        "a branch does not see its prefix",
        ATTENTION,
        "            chains.append([*(chains[parent] if parent >= 0 else []), number])\n",
        "            chains.append([number])\n",
        (ALONE,),
    ),
    Mutant(
        "a branch of a branch sees only the nearer one",
        ATTENTION,
        "            chains.append([*(chains[parent] if parent >= 0 else []), number])\n",
        "            chains.append([*([parent] if parent >= 0 else []), number])\n",
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
        "            return (key <= query) & related",
        "            return related",
        (FLEX,),
    ),
    Mutant(
        "FlexAttention does not see prefixes",
        ATTENTION,
        "            related[number, chain] = True\n",
        "            related[number, number] = True\n",
        (FLEX,),
    ),
    Mutant(
        "a branch continues the segment before its prefix",
        PACKING,
        "            parent, before = len(self.segments), self.length + shared - 1\n",
        "            parent, before = len(self.segments) - 1, self.length + shared - 1\n",
        (OF_PACKS,),
    ),
    Mutant(
        "a branch's first label is predicted by the token before it in the row",
        PACKING,
        "            sources[0] = before\n",
        "",
        (GRADIENT,),
    ),
    Mutant(
        "a label is predicted by its own token",
        PACKING,
        "        sources = places + (start - 1)\n",
        "        sources = places + start\n",
        (GRADIENT,),
    ),
    Mutant(
        "a prefix lies in the row for every record",
        PACKING,
        "            self._append(example.input_ids[shared:], parent)\n",
        "            self._append(example.input_ids, parent)\n",
        (OF_PACKS,),
    ),
    Mutant(
        "every loss is counted for the first record",
        PACKING,
        "torch.full_like(places, len(self.record_ids))",
        "torch.zeros_like(places)",
        (GRADIENT,),
    ),
    Mutant(
        "what fills up a row continues its last record",
        PACKING,
        "            self._append(torch.full((missing,), pad_token_id), -1)\n",
        "            self._append(torch.full((missing,), pad_token_id), len(self.segments) - 1)\n",
        (OF_PACKS,),
    ),
    Mutant(
        "a group of one image is never split over packs",
        PACKING,
        "            if tokens + rest > max_tokens:\n",
        "            if False:\n",
        (HELD,),
    ),
    Mutant(
        "a split group drops the records before the split",
        PACKING,
        "                yield _unit(taken, sizes)\n                taken, tokens",
        "                taken, tokens",
        (HELD,),
    ),
    Mutant(
        "packs may be longer than they may",
        PACKING,
        "        while packs and packs[0][2] + units[number].tokens > max_tokens:\n",
        "        while False:\n",
        (HELD,),
    ),
    Mutant(
        "the number of packs is no multiple of the number of processes",
        PACKING,
        "    return max(1, -(-count // of)) * of\n",
        "    return max(1, count)\n",
        (HELD,),
    ),
    Mutant(
        "images weigh nothing when packs are balanced",
        PACKING,
        "    weights = [unit.tokens + image_cost * unit.images for unit in units]\n",
        "    weights = [float(unit.tokens) for unit in units]\n",
        (f"{OF_PACKS}::test_packs_are_about_equally_heavy_in_tokens_and_images",),
    ),
    Mutant(
        "records are shared out as they come",
        PACKING,
        "    heaviest_first = sorted(range(len(units)), key=lambda number: -weights[number])\n",
        "    heaviest_first = list(range(len(units)))\n",
        (f"{OF_PACKS}::test_packs_are_about_equally_heavy_in_tokens_and_images",),
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
        (f"{OF_DATA}::test_a_beginning_that_is_learned_is_not_shared",),
    ),
    Mutant(
        "a record stands among others' first looks at its second",
        "vlm_sft/data/sampler.py",
        "        look = looks[index] = looks.get(index, -1) + 1\n",
        "        look = looks[index] = 0\n",
        (
            f"{OF_PACKS}::test_records_of_one_prefix_follow_the_first_of_them_and_second_looks_come_apart",
        ),
    ),
    Mutant(
        "each record of a group brings the shared image",
        "vlm_sft/data/loader.py",
        "first_image=1 if loaded else 0",
        "first_image=0",
        (GRADIENT,),
    ),
    Mutant(
        "a pack's loss is a mean",
        "vlm_sft/model/loss.py",
        "        return joined.sum(), joined\n",
        "        return joined.mean(), joined\n",
        (GRADIENT,),
    ),
    Mutant(
        "only the last chunk's gradient reaches the head",
        "vlm_sft/model/loss.py",
        "                total += gradient\n",
        "                total.copy_(gradient)\n",
        ("tests/model/test_loss.py",),
    ),
    Mutant(
        "the loss's gradient does not heed what it is multiplied by",
        "vlm_sft/model/loss.py",
        "(g * of_sum.to(g.dtype) for g in ctx.saved_tensors)",
        "(g * 1.0 for g in ctx.saved_tensors)",
        ("tests/model/test_loss.py",),
    ),
    Mutant(
        "a packed record's noise is that of the whole row",
        "vlm_sft/model/neftune.py",
        "    whole = (sees * own).sum(dim=1)\n",
        "    whole = own.sum().expand(len(own))\n",
        ("tests/model/test_neftune.py",),
    ),
    Mutant(
        "the last MLP's rows come back in other places",
        "vlm_sft/model/last_layer.py",
        "whole.index_copy(0, self._rows, output.squeeze(0))",
        "whole.index_copy(0, self._rows.flip(0), output.squeeze(0))",
        ("tests/train/test_packing.py",),
    ),
    Mutant(
        "a place that predicts two tokens is computed twice in the last MLP",
        PACKING,
        "            needed=torch.unique(sources),\n",
        "            needed=sources,\n",
        ("tests/train/test_packing.py",),
    ),
    Mutant(
        "the model is not asked whether it isolates",
        "vlm_sft/train/packing_check.py",
        "        prove_isolation(model, backend, device, TOLERANCE[precision])\n",
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
