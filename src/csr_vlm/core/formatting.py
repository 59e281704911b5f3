"""Format numbers and times for people. Unknown values become a dash."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from markupsafe import Markup, escape

UNKNOWN = "–"
_MOST_DIGITS = 9
_INDEXED = re.compile(r"\b(CHAIR|R)_([SIT])\b")


def counts(numbers: Mapping[str, int]) -> str:
    """Format numbers by their names.

    Example:
        >>> counts({"identical": 3, "margin": 1})
        '3 identical, 1 margin'
    """
    return ", ".join(f"{number} {name}" for name, number in numbers.items())


def fixed(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals and a typographic minus sign.

    Example:
        >>> fixed(-0.25, 2)
        '−0.25'
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference, with a plus sign if it is positive."""
    text = fixed(value, digits)
    return f"+{text}" if value is not None and value > 0 and text != UNKNOWN else text


def compact(value: float | None) -> str:
    """Format a number of unknown magnitude: one decimal from 10 on, three below."""
    if value is None:
        return UNKNOWN
    return fixed(value, 1 if abs(value) >= 10 else 3)


def scientific(value: float | None) -> str:
    """Format a small number with two significant digits."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")


def percent(fraction: float | None) -> str:
    """Format a fraction of 1 as a whole percentage."""
    return UNKNOWN if fraction is None else f"{fixed(100 * fraction, 0)} %"


def interval(low: float | None, high: float | None, digits: int | None = 3) -> str:
    """Format an interval; empty if there is none. Bounds that differ never look the same.

    Args:
        low: Lower bound.
        high: Upper bound.
        digits: Decimals; None chooses them by magnitude.

    Example:
        >>> interval(0.25, 0.5, 2), interval(0.99964, 1.0)
        ('0.25 to 0.50', '0.9996 to 1.0000')
    """
    if low is None or high is None:
        return ""
    if digits is None:
        return f"{compact(low)} to {compact(high)}"
    while low != high and fixed(low, digits) == fixed(high, digits) and digits < _MOST_DIGITS:
        digits += 1
    return f"{fixed(low, digits)} to {fixed(high, digits)}"


def relative_change(before: float | None, after: float | None) -> str | None:
    """Format (after - before) / abs(before) as a percentage; return None if it is undefined."""
    if before is None or after is None or before == 0:
        return None
    change = 100 * (after - before) / abs(before)
    # Otherwise -99.6 % would be rounded to -100 %.
    return f"{signed(change, 1 if -100 < change < -99 else 0)} %"


def count(value: float | None) -> str:
    """Format a whole number with separated thousands."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """Format a number with its noun: '1 prompt', '2 prompts'."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """Format a time in seconds.

    Example:
        >>> duration(0.4), duration(42), duration(185), duration(7800)
        ('0.4 s', '42 s', '3 min 5 s', '2 h 10 min')
    """
    if seconds is None:
        return UNKNOWN
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def indexed(text: str) -> Markup:
    """Escape a text for HTML and set the indices of CHAIR_S, CHAIR_I, R_I and R_T as subscripts.

    Example:
        >>> indexed("R_I < 40")
        Markup('R<sub>I</sub> &lt; 40')
    """
    return Markup(_INDEXED.sub(r"\1<sub>\2</sub>", str(escape(text))))  # noqa: S704 - escaped on this line


def article(word: str) -> str:
    """Return the indefinite article of an English word, by its first letter.

    Example:
        >>> article("umbrella"), article("boat")
        ('an', 'a')
    """
    return "an" if word[:1].lower() in tuple("aeiou") else "a"
