"""Hooks for mkdocs: pages generated from code and notebooks, and docstrings turned into Markdown.

A hook of mkdocs and an extension of griffe, named in mkdocs.yml. Pages generated here, which are not on disk:
``api/*.md``, one for each part of the package; ``cli.md``, from the commands themselves; ``notebooks/*.md``.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "open_mythos"
HIDDEN = {"__init__", "__main__", "cli", "main", "pretrained"}  # the command line has a page of its own


# -- navigation


def on_config(config: Any) -> Any:
    """Fill in the navigation: pages of docs that it does not name, notebooks, a page for each part of the package."""
    named = set(_named(config.nav))
    others = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named)
    sections = {title: pages for section in config.nav for title, pages in section.items()}
    sections["Guides"].extend(others)
    sections["Notebooks"].extend(f"notebooks/{path.stem}.md" for path in notebooks())
    sections["API"].extend(f"api/{part}.md" for part in parts())
    return config


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(item)


def on_files(files: Files, config: Any) -> Files:
    made = {f"api/{part}.md": api_page(part) for part in parts()}
    made |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in notebooks()}
    for uri, content in (made | {"cli.md": cli_page()}).items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links that leave docs/, which have no page on the site, by the file's name."""
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+([^)]+)\)", r"\1 (`\2`)", markdown)


# -- pages


def parts() -> list[str]:
    """Modules and packages at the top of the package."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    return sorted(name for name in found - HIDDEN if not name.startswith("_"))


def api_page(part: str) -> str:
    """Every public module of a part, the package's own docstring first."""
    inside = sorted((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in inside]
    return f"# {part}\n\n" + "\n\n".join(f"::: {name}" for name in names if not name.split(".")[-1].startswith("_"))


def cli_page() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    import typer

    from open_mythos.cli import COMMANDS, EXAMPLES, app

    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "`mythos COMMAND --help` shows the same. Errors are one red line, and exit status 2.",
    ]
    for name in COMMANDS:
        command = group.commands[name].make_context(name, [], resilient_parsing=True).command
        lines += ["", f"## mythos {name}", "", command.help, "", f"Example: `{EXAMPLES[name]}`", ""]
        lines += ["| | | default |", "|---|---|---|"]
        for parameter in command.params:
            option = parameter.param_type_name == "option"
            label = ", ".join(f"`{word}`" for word in (parameter.opts if option else [_metavar(parameter)]))
            default = f"`{parameter.default}`" if isinstance(parameter.default, int | float | str | Path) else ""
            default = "" if isinstance(parameter.default, bool) else default
            lines.append(f"| {label} | {parameter.help or ''} | {default} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook_page(path: Path) -> str:
    """Text as it is, code in fences, its output below."""
    lines = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        lines.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        lines += [shown for output in cell.get("outputs", []) if (shown := _shown(output))]
    lines.append(f"*This page is `notebooks/{path.name}` of the repository, as it was last run.*")
    return "\n\n".join(lines) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        return f"![figure of this cell](data:image/png;base64,{picture})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


# -- docstrings


class Roles(griffe.Extension):
    """Docstrings name things as ``:class:`Thing```; Markdown has no roles, so they become code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^::$", "", plain, flags=re.MULTILINE)
