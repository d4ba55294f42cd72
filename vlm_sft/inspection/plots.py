"""Draw the histograms of the records page as PNG images."""

import io
from typing import Any

import numpy as np

from vlm_sft.inspection.records import NO_LIMIT
from vlm_sft.inspection.statistics import SourceStatistics


def lengths_histogram(total: SourceStatistics, max_length: int) -> bytes:
    """Return a histogram of tokens per record, without and with image tokens, and the limit."""
    figure, axes = _figure()
    if total.lengths:
        longest, shortest = max(total.lengths), min(total.text_lengths)
        bins = np.linspace(shortest, longest + 1, num=min(60, longest - shortest + 1) + 1)
        axes.hist(total.text_lengths, bins=bins, color="#9db8e8", label="without image tokens")
        style = {"histtype": "step", "color": "#123a7a", "lw": 1.8}
        axes.hist(total.lengths, bins=bins, label="with image tokens", **style)
        if max_length != NO_LIMIT and max_length <= 4 * longest:
            axes.axvline(max_length, color="#b3261e", ls="--", lw=1.6, label="max_length")
        elif max_length != NO_LIMIT:
            # A line far to the right would squeeze the histogram into the left edge.
            note = f"max_length {max_length:,} is far to the right"
            axes.text(0.98, 0.6, note, transform=axes.transAxes, ha="right", color="#b3261e")
        axes.legend(framealpha=0.9, edgecolor="none")
    axes.set(title="Tokens per record", xlabel="tokens", ylabel="records")
    return _png(figure)


def shares_histogram(total: SourceStatistics) -> bytes:
    """Return a histogram of the share of each record's text tokens that is trained."""
    figure, axes = _figure()
    if total.shares:
        percent = 100 * np.asarray(total.shares)
        axes.hist(percent, bins=np.linspace(0, 100, 51), color="#8cc9a5")
        mean = 100 * total.counts["trained_tokens"] / total.counts["text_tokens"]
        axes.axvline(mean, color="#1a5e39", ls="--", lw=1.6, label=f"all records: {mean:.0f} %")
        axes.legend(framealpha=0.9, edgecolor="none")
    axes.set(title="Trained share of text tokens", xlabel="%", ylabel="records", xlim=(0, 100))
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.3), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No version of matplotlib in the file: the same data gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
