"""The page: one HTML file with its style, its script and its data inside."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template
from typing import Any

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def render(data: dict[str, Any]) -> str:
    """The page of what :func:`~open_mythos.report.data.gather` found.

    Nothing in ``data`` can become markup or script: the title is escaped, the rest is JSON without angle brackets,
    which the script puts on the page as text.
    """
    source = files("open_mythos.report")
    style, charts, page = (source.joinpath(name).read_text("utf-8") for name in ("page.css", "charts.js", "page.js"))
    return Template(source.joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(data["title"]),
        style=style.strip(),
        script=f"{charts}\n{page}".strip(),
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES),
    )
