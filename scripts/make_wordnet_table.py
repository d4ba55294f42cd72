"""Make the table of words that verification reads, from the files of WordNet.

    python scripts/make_wordnet_table.py /usr/share/wordnet

The folder is that of WordNet 3.0 (Debian's package `wordnet-base`) or 3.1. Writes
`data_tools/wording/wordnet.txt`: single lower-case words for things that can be seen, and verbs,
each with at most `SENSES` of its most frequent senses. A word is kept if WordNet's own definitions
or its annotated texts use it, so that names of rare species and chemicals stay out.

    # nouns                a section, one sense a line
    12 3 sofa+ couch+ lounge
    # irregular verbs      (or nouns) forms that their endings do not tell
    ran run

A line of a sense has its number, the number of the next wider sense (0: none), and its words. The
first one names the sense; `*` marks a name that is no kept word, or rare in this sense, and `+` a
word that mostly has this sense, or may have: of words that annotated texts lack, nothing is known.
Wider senses come before narrower ones. `# mostly verbs` lists words that are nouns as well, and
verbs more often, `# mostly adjectives` those that are adjectives more often.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vlm_sft.utils.atomic_files import write_text

TABLE = Path(__file__).parent.parent / "data_tools" / "wording" / "wordnet.txt"
SENSES: Final = {"noun": 3, "verb": 4}
"""At most this many senses of a word, the most frequent first."""
USES: Final = 2
"""A word occurs so often in definitions, or at all in annotated texts."""
VISIBLE: Final = frozenset({4, 5, 6, 8, 10, 11, 13, 14, 15, 17, 18, 19, 20, 27})
"""Numbers of WordNet's files of nouns for acts, animals, artifacts, parts of the body, signs and
media, events, food, groups, places, natural objects, people, weather, plants and substances."""


@dataclass(frozen=True)
class Sense:
    """A synonym set of WordNet; `wider` is the key of its first hypernym."""

    file: int
    words: tuple[str, ...]
    wider: str | None


def main(argv: Sequence[str]) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wordnet", type=Path, help="folder with data.noun, index.noun, ...")
    folder = parser.parse_args(argv).wordnet
    uses = count_uses(folder)
    lines = [f"# {line}".rstrip() for line in LICENSE.splitlines()]
    tagged = {part: count_tagged(folder, number) for part, number in (("noun", 1), ("verb", 2))}
    kept: dict[str, set[str]] = {}
    for part in ("noun", "verb"):
        senses, index = read_part(folder, part)
        rows, kept[part] = select(part, senses, index, uses, tagged[part])
        lines += [f"# {part}s", *rows]
    for part, words in kept.items():
        lines += [f"# irregular {part}s", *irregular(folder, part, words)]
    both = sorted(kept["verb"] & read_part(folder, "noun")[1].keys())
    lines += ["# mostly verbs"]
    lines += [word for word in both if tagged["verb"][word] > tagged["noun"][word]]
    adjectives = count_tagged(folder, 3) + count_tagged(folder, 5)
    lines += ["# mostly adjectives"]
    lines += [
        word
        for word in sorted(kept["verb"] | kept["noun"])
        if adjectives[word] > max(tagged["verb"][word], tagged["noun"][word])
    ]
    write_text(TABLE, "\n".join(lines) + "\n")
    print(f"{TABLE.name}: {len(lines)} lines, {TABLE.stat().st_size / 1024:.0f} KiB")
    return 0


def count_uses(folder: Path) -> Counter[str]:
    """Count the words of all definitions and examples."""
    uses: Counter[str] = Counter()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            uses.update(re.findall(r"[a-z]+", line.partition(" | ")[2].lower()))
    return uses


def count_tagged(folder: Path, number: int) -> Counter[str]:
    """Count how often annotated texts have a word as noun 1, verb 2, adjective 3 or 5."""
    tagged: Counter[str] = Counter()
    for line in (folder / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        if rest[0] == str(number):
            tagged[word] += int(count)
    return tagged


def read_part(folder: Path, part: str) -> tuple[dict[str, Sense], dict[str, list[str]]]:
    """Read the senses of a part of speech by key, and the keys of every word's senses."""
    senses = {}
    for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):
            continue
        fields = line.partition(" | ")[0].split()
        count = int(fields[3], 16)
        end = 4 + 2 * count
        pointers = fields[end + 1 :]
        wider = [pointers[i + 1] for i in range(0, 4 * int(fields[end]), 4) if pointers[i] == "@"]
        words = tuple(fields[4:end:2])
        senses[fields[0]] = Sense(int(fields[1]), words, wider[0] if wider else None)
    index = {}
    for line in (folder / f"index.{part}").read_text(encoding="latin-1").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            index[fields[0]] = fields[6 + int(fields[3]) :]
    return senses, index


def select(
    part: str,
    senses: Mapping[str, Sense],
    index: Mapping[str, Sequence[str]],
    uses: Mapping[str, int],
    tagged: Counter[str],
) -> tuple[list[str], set[str]]:
    """Return the lines of the kept senses, wider ones first, and the kept words."""
    words_of: dict[str, list[str]] = {}
    kept: set[str] = set()
    for word, keys in index.items():
        frequent = uses.get(word, 0) + uses.get(f"{word}s", 0) >= USES or tagged.get(word, 0)
        if not word.isalpha() or len(word) < 3 or not frequent:
            continue
        for key in keys[: SENSES[part]]:
            sense = senses[key]
            if word in sense.words and (part == "verb" or sense.file in VISIBLE):
                words_of.setdefault(key, []).append(word)
                kept.add(word)
    numbers: dict[str, int] = {}
    lines: list[str] = []

    def number(key: str) -> int:
        if key not in numbers:
            wider = senses[key].wider
            above = number(wider) if wider is not None else 0
            numbers[key] = len(numbers) + 1
            here = words_of.get(key, ())
            first = senses[key].words[0]
            named = [] if first in here else [f"*{first.lower()}"]
            for word in senses[key].words:
                if word in here:
                    mostly = index[word][0] == key or not tagged[word]
                    named.append(f"{word}+" if mostly else word)
            lines.append(" ".join([str(numbers[key]), str(above), *named]))
        return numbers[key]

    for key in sorted(words_of):
        number(key)
    return lines, kept


def irregular(folder: Path, part: str, kept: set[str]) -> list[str]:
    """Return the irregular forms of kept words, each with its word."""
    found = set()
    for line in (folder / f"{part}.exc").read_text(encoding="latin-1").splitlines():
        form, *stems = line.split()
        if form.isalpha():
            found.update(f"{form} {stem}" for stem in stems if stem in kept and stem != form)
    return sorted(found)


LICENSE: Final = """Made from WordNet 3.0 by scripts/make_wordnet_table.py; do not edit.

WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.

This software and database is being provided to you, the LICENSEE, by Princeton University under the
following license.  By obtaining, using and/or copying this software and database, you agree that
you have read, understood, and will comply with these terms and conditions.:

Permission to use, copy, modify and distribute this software and database and its documentation for
any purpose and without fee or royalty is hereby granted, provided that you agree to comply with the
following copyright notice and statements, including the disclaimer, and that the same appear on ALL
copies of the software, database and documentation, including modifications that you make for
internal use or for distribution.

THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR
WARRANTIES, EXPRESS OR IMPLIED.  BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES
NO REPRESENTATIONS OR WARRANTIES OF MERCHANT- ABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT
THE USE OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY
PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.

The name of Princeton University or Princeton may not be used in advertising or publicity pertaining
to distribution of the software and/or database.  Title to copyright in this software, database and
any associated documentation shall at all times remain with Princeton University and LICENSEE agrees
to preserve same."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
