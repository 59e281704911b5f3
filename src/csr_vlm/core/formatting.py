"""Numbers and times as a reader wants them. A dash stands for what is not known."""

from __future__ import annotations

import math
import re

from markupsafe import Markup, escape

UNKNOWN = "–"
_INDEXED = re.compile(r"\b(CHAIR|R)_([SIT])\b")


def fixed(value: float | None, digits: int = 3) -> str:
    """Write a number with so many decimals and a true minus sign.

    Example:
        >>> fixed(-0.25, 2)
        '−0.25'
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Write a difference; a plus sign where it is positive."""
    text = fixed(value, digits)
    return f"+{text}" if value is not None and value > 0 and text != UNKNOWN else text


def compact(value: float | None) -> str:
    """Write a number of unknown size: one decimal from 10 on, three below."""
    if value is None:
        return UNKNOWN
    return fixed(value, 1 if abs(value) >= 10 else 3)


def scientific(value: float | None) -> str:
    """Write a small number with two significant digits."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")


def percent(share: float | None) -> str:
    """Write a share of 1 as a whole percentage."""
    return UNKNOWN if share is None else f"{fixed(100 * share, 0)} %"


def relative_change(before: float | None, after: float | None) -> str | None:
    """Write (after - before) / before as a percentage; None where it has no meaning."""
    if before is None or after is None or before == 0:
        return None
    change = 100 * (after - before) / abs(before)
    # -99.6 % is not -100 %.
    return f"{signed(change, 1 if -100 < change < -99 else 0)} %"


def count(value: float | None) -> str:
    """Write a whole number with separated thousands."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """Write a number with its noun: '1 prompt', '2 prompts'."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """Write seconds as '42 s', '3 min 5 s' or '2 h 10 min'."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def indexed(text: str) -> Markup:
    """Escape a text and set the indices of CHAIR_S, CHAIR_I, R_I and R_T low.

    Example:
        >>> indexed("R_I < 40")
        Markup('R<sub>I</sub> &lt; 40')
    """
    return Markup(_INDEXED.sub(r"\1<sub>\2</sub>", str(escape(text))))  # noqa: S704 - escaped just here
