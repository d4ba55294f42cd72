"""Write `length_controlled.json`: win rates that alpaca_eval's own code gives.

    pip install alpaca-eval==0.6.6 scikit-learn==1.9.1 patsy      # in another environment
    python tests/golden/scores/length_controlled.py > tests/golden/scores/length_controlled.json

The formula is `length_controlled_minimal`, which does not use the difficulty of instructions;
alpaca_eval downloads their table before it knows that, so a table of zeros takes its place.
"""

import json
import random
import tempfile
import warnings
from pathlib import Path

CASES = [(40, 1, 0.0), (200, 2, 1.5), (200, 3, -2.0), (805, 4, 0.7), (805, 5, 0.0)]
"""Number of questions, seed, and how much the judge likes long answers."""


def comparisons(count: int, seed: int, taste: float) -> tuple[list[float], list[int], list[int]]:
    """Return preferences for the model (0 to 1) and the lengths of its and the other answer."""
    rng = random.Random(seed)
    preferences, ours, theirs = [], [], []
    for _ in range(count):
        ours.append(rng.randint(20, 900))
        theirs.append(rng.randint(20, 600))
        lean = 0.5 + taste * (ours[-1] - theirs[-1]) / 2000 + rng.uniform(-0.5, 0.5)
        preferences.append(rng.choice([round(min(1.0, max(0.0, lean))), 0.5, min(1, max(0, lean))]))
    return [float(p) for p in preferences], ours, theirs


def main() -> None:
    warnings.simplefilter("ignore")
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    found = []
    for count, seed, taste in CASES:
        preferences, ours, theirs = comparisons(count, seed, taste)
        frame = pd.DataFrame(
            {"preference": [1 + p for p in preferences], "index": range(count),
             "output_1": ["x" * n for n in theirs], "output_2": ["x" * n for n in ours],
             "generator_1": "baseline", "generator_2": "model", "annotator": "a"}
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "df_gamed.csv"
            zeros = pd.DataFrame(
                {"index": range(count), "instruction_difficulty": 0.0, "model": "m"}
            )
            zeros.to_csv(table, index=False)
            glm_winrate.hf_hub_download = lambda table=table, **_: str(table)
            metrics = glm_winrate.get_length_controlled_winrate(
                frame, "length_controlled_minimal", save_weights_dir=None,
                is_warn_extreme_changes=False,
            )  # fmt: skip
        found.append([metrics["win_rate"], float(metrics["length_controlled_winrate"])])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
