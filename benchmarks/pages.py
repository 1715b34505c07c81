"""Tables of pages: their Markdown, and their place in a page."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def fill(page: str, tables: str) -> str:
    """The page, with ``tables`` in place of the text between its marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def write(page: Path, tables: str) -> None:
    page.write_text(fill(page.read_text(), tables))


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = False) -> list[str]:
    """The lines of a Markdown table; with ``numbers``, all columns except the first are right-aligned."""
    columns = list(columns)
    rule = "|---" + ("|---:" if numbers else "|---") * (len(columns) - 1) + "|"
    return ["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean (min – max), or the value itself if there is only one."""
    around = f" ({min(values):.{digits}f} – {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"
