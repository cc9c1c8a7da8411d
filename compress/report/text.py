"""How figures are written: sizes, times, shares, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

DASH, TIMES, SPACE, MINUS, ARROW = "\u2013", "\u00d7", "\u00a0", "\u2212", "\u2192"

NOT_FINITE = "not finite"
"""What stands for NaN and infinities, which a report holds as null."""

FEW = 8
"""So many values of one kind are named one by one."""

GATE_NAMES = {
    "perplexity_ratio": "perplexity, after / before",
    "kl": "KL divergence",
    "top1_agreement": "top-1 agreement",
    "accuracy_drop": "accuracy lost",
    "retrieval_drop": "retrieval lost",
    "bits_per_weight": "bits per weight",
    "size_ratio": "size, after / before",
    "fallbacks": "fallbacks",
}


def size_text(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor * 0.9995:
            return f"{digits(count / factor)}{SPACE}{unit}"
    return f"{count:.0f}{SPACE}B"


def time_text(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 59.95:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def percent_text(share: float | None) -> str:
    """A share in percent, as many digits as it takes to see it: also what is close to none or to all."""
    if share is None:
        return NOT_FINITE
    far = min(abs(share), abs(1 - share)) * 100
    digits = 1 if far >= 1 or far == 0 else min(1 - math.floor(math.log10(far)), 6)
    return f"{share * 100:.{digits}f}{SPACE}%"


def share_text(share: float) -> str:
    """A share on an axis, where round numbers have no digits to spare."""
    return f"{share * 100:.3g}{SPACE}%" if share >= 1e-6 or share == 0 else f"{share * 100:.0e}{SPACE}%"


def count_text(value: float) -> str:
    """A count with its thousands set apart, large ones rounded."""
    return f"{digits(value / 1e9)} billion" if value >= 1e9 else f"{digits(value / 1e6)} million" if value >= 1e6 else f"{value:,.0f}"


def digits(value: float) -> str:
    """Three significant digits, without an exponent for what is shown here."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def digits4(value: float | None) -> str:
    if value is None:
        return NOT_FINITE
    return f"{value:#.4g}".removesuffix(".") if abs(value) < 1e4 else f"{value:,.0f}"


def small(value: float | None) -> str:
    """Three significant digits, with an exponent only for what is far too long without."""
    if value is None:
        return NOT_FINITE
    text = f"{value:,.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def decimals(value: float | None) -> str:
    """Four decimals, for figures that are set off against each other."""
    if value is None:
        return NOT_FINITE
    return f"{MINUS if value < 0 else ''}{abs(value):.4f}"


def score_text(name: str) -> str:
    """Scores of an allocation, with their unit: those that are called after a round are divergences too, measured again."""
    return f"kl, {name}, nats" if name.startswith("round ") else "kl, nats" if name == "kl" else name


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    rounded = f"{abs(value) * 100:.2f}"
    return f"{MINUS if value < 0 and float(rounded) else ''}{rounded}{SPACE}points"


def figure_text(name: str, value: float | None) -> str:
    """A gated figure in its unit."""
    if value is None:
        return "not measured"
    match name:
        case "perplexity_ratio":
            return f"{TIMES}{value:.4f}"
        case "kl":
            return f"{small(value)}{SPACE}nats"
        case "top1_agreement" | "size_ratio":
            return percent_text(value)
        case "accuracy_drop" | "retrieval_drop":
            return points(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def gated_text(name: str, value: float | None) -> str:
    """The figure of a gate: all but bits per weight, which need weights that are quantised, are measured if there is a gate."""
    return NOT_FINITE if value is None and name != "bits_per_weight" else figure_text(name, value)


def bound_text(name: str, bound: dict[str, float | None]) -> str:
    """What a gate lets through."""
    limits = [("at least", bound.get("min")), ("at most", bound.get("max"))]
    return ", ".join(f"{side} {figure_text(name, limit)}" for side, limit in limits if limit is not None)


def interval_text(name: str, interval: Iterable[float | None] | None) -> str | None:
    ends = list(interval or ())
    if len(ends) != 2 or None in ends:
        return None
    if ends[0] == ends[1]:
        return "exact"
    # The unit stands once, behind the upper end.
    return f"{figure_text(name, ends[0]).partition(SPACE)[0]} to {figure_text(name, ends[1])}"


def spread(values: Sequence[float | None], text: Callable[[float], str], *, middle_only: bool = False) -> str:
    """A few values in order, or the ends and the middle of many; what is not finite is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_FINITE if values else ""
    if middle_only:
        return text(median(known))
    if len(known) <= FEW:
        return ", ".join(map(text, known))
    return f"{text(min(known))} to {text(max(known))}, median {text(median(known))}"


def plain(mapping: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), value_text(value)) for key, value in (mapping or {}).items() if value is not None]


def value_text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else small(value) if isinstance(value, float) else str(value)
