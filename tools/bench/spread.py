"""How a figure that was measured several times is printed."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], format: str) -> str:
    """Median, lowest and highest, each in a format such as ",.1f"."""
    median, low, high = (f"{f(values):{format}}" for f in (statistics.median, min, max))
    return f"{median} ({low}-{high})"
