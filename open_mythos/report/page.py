"""Renders a report as one HTML file with inline style, script and data."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template
from typing import Any

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def render(data: dict[str, Any]) -> str:
    """The HTML of the data from :func:`~open_mythos.report.data.gather`.

    Injection-safe: the title is escaped, the rest is JSON without angle brackets, inserted as text nodes.
    """
    source = files("open_mythos.report")
    style, charts, page = (source.joinpath(name).read_text("utf-8") for name in ("page.css", "charts.js", "page.js"))
    return Template(source.joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(data["title"]),
        style=style.strip(),
        script=f"{charts}\n{page}".strip(),
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES),
    )
