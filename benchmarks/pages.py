"""Tables in pages: how they are written, and where they stand in a page."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def fill(page: str, tables: str) -> str:
    """The page with what stands between its marks replaced."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def write(page: Path, tables: str) -> None:
    page.write_text(fill(page.read_text(), tables))


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = False) -> list[str]:
    """Its lines in Markdown; with ``numbers``, all columns but the first are aligned on the right."""
    columns = list(columns)
    rule = "|---" + ("|---:" if numbers else "|---") * (len(columns) - 1) + "|"
    return ["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean (min – max), or the one value there is."""
    around = f" ({min(values):.{digits}f} – {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"
