"""Numbers as text: a true minus sign, three significant digits, and round axis ticks."""

import math
from collections.abc import Callable, Sequence

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOTHING = "–"
"""Shown for a missing value."""


def plain(value: float) -> str:
    """Three significant digits, with a power of ten outside 0.001 … 99,999.

    >>> plain(0.01234), plain(-2.0), plain(1532.4), plain(4.6172e-7), plain(5e-4), plain(0.0)
    ('0.0123', '−2', '1,532', '4.62×10⁻⁷', '5×10⁻⁴', '0')
    """
    size = abs(value)
    if size and not 1e-3 <= size < 99_999.5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return minus(f"{float(mantissa):g}") + power_of_ten(int(exponent))
    if size >= 1000:
        return whole(value)
    return minus(f"{float(f'{value:.3g}'):g}")


def signed(value: float) -> str:
    """Two decimals with a sign, except for zero.

    >>> signed(0.4), signed(-2), signed(0.001)
    ('+0.40', '−2.00', '0.00')
    """
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else minus(text)


def percent(value: float) -> str:
    """A fraction in percent with one decimal.

    >>> percent(0.0625), percent(1)
    ('6.2 %', '100.0 %')
    """
    return f"{100 * value:.1f} %"


def whole(value: float) -> str:
    """An integer with separated thousands.

    >>> whole(12345.0)
    '12,345'
    """
    return minus(f"{value:,.0f}")


def seconds(value: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours and minutes.

    >>> seconds(3.14159), seconds(250), seconds(64080)
    ('3.1 s', '4.2 min', '17 h 48 min')
    """
    if value < 120:
        return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


FORMATS: dict[str, Callable[[float], str]] = {
    "plain": plain,
    "signed": signed,
    "percent": percent,
    "whole": whole,
    "seconds": seconds,
}


def format_value(value: float | None, kind: str) -> str:
    """Format a value by one of `FORMATS`; `NOTHING` for None."""
    return NOTHING if value is None else FORMATS[kind](value)


def power_of_ten(exponent: int) -> str:
    """The factor after a mantissa.

    >>> power_of_ten(-7)
    '×10⁻⁷'
    """
    return f"×10{str(exponent).translate(SUPERSCRIPT)}"


def minus(text: str) -> str:
    """Replace hyphens with true minus signs."""
    return text.replace("-", "−")


def ticks(low: float, high: float, limit: int = 5) -> list[float]:
    """Return at most ``limit`` round values in [low, high], spaced by 1, 2 or 5 times a power of ten.

    >>> ticks(0, 0.19), ticks(-2, 1)
    ([0.0, 0.05, 0.1, 0.15], [-2.0, -1.0, 0.0, 1.0])
    """
    if not (high - low) / limit > 1e-300:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / limit))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < limit:
            return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
    return [low, high]


def tick_labels(values: Sequence[float], kind: str) -> list[str]:
    """Label ticks with as many decimals as they need; small values share one power of ten.

    >>> tick_labels([0.0, 0.005, 0.01], "percent"), tick_labels([-1.0, 0.0, 1.0], "signed")
    (['0 %', '0.5 %', '1 %'], ['−1', '0', '1'])
    >>> tick_labels([0.0, 0.0005, 0.001], "plain")
    ['0', '0.5×10⁻³', '1×10⁻³']
    """
    if kind == "percent":
        return [f"{float(f'{100 * value:.6g}'):g} %" for value in values]
    largest = max(map(abs, values), default=0.0)
    if 1e-290 < largest < 0.01:
        exponent = math.floor(math.log10(largest) + 1e-9)
        scaled = [float(f"{value / 10**exponent:.6g}") for value in values]
        return [minus(f"{value:g}") + power_of_ten(exponent) if value else "0" for value in scaled]
    return [minus(f"{float(f'{value:.6g}'):,g}") for value in values]
