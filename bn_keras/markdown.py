"""Cells and tables of the reports, as Markdown; standard library only."""

import statistics
from collections.abc import Callable, Iterable


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers. A cell may hold any text, such as a name."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _cell(text):
    return " ".join(text.splitlines()).replace("|", "\\|")


def percent(share: float, digits: int = 1) -> str:
    """A share, from 0 to 1, in percent."""
    return f"{share:.{digits}%}"


def mean_and_range(values: Iterable[float], form: Callable[[float], str]) -> str:
    """The mean of the values and, of several, the lowest and highest, each made text by `form`; "" without values."""
    values = list(values)
    if not values:
        return ""
    mean = form(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form(min(values))} to {form(max(values))})"
