"""The ``mythos`` command. Each subcommand is a function of its own name (``train-gate``: ``train_gate``) in a module of
that name.

A subcommand's module is imported when it is called, and the library when it runs, so that no ``--help`` and no mistyped
option waits for torch or matplotlib: what needs them is imported in functions, or stands in a module beside the
command's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from open_mythos import __version__

COMMANDS = {
    "demo": "Train a small model and watch depth pay.",
    "train": "Train a model by a recipe, and measure it.",
    "train-gate": "Teach a trained model when to stop, and leave it as it is otherwise.",
    "eval": "Accuracy over difficulty and loops, and what depth does.",
    "report": "One page about a run: curves, and every loop of an example.",
    "chat": "Talk to a model of text, at any depth, and see every loop.",
    "retrofit": "Make a pretrained model a recurrent-depth one.",
    "export": "Write a model for transformers, with the source that loads it anywhere.",
    "compare": "Train a model and two that do not loop, and see who wins.",
    "info": "What a variant or a checkpoint costs: parameters, arithmetic, cache.",
    "convert": "Turn a checkpoint of the reference implementation into a model of this library.",
    "bench": "How fast a model trains, reads and decodes here.",
    "diagnose": "Look inside a checkpoint, loop by loop.",
}


class LazyCommand(TyperCommand):
    """A subcommand known by name and one line of help; the real one takes over when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        single = typer.Typer(add_completion=False)
        python_name = self.name.replace("-", "_")
        single.command(self.name)(getattr(import_module(f"{__name__}.{python_name}"), python_name))
        return typer.main.get_command(single).make_context(info_name, args, parent, **extra)


class LazyGroup(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, line in COMMANDS.items():
            self.add_command(LazyCommand(name, callback=None, help=line))


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def mythos(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Recurrent-depth transformers: the same weights, run for more loops, think deeper."""


def main() -> None:
    """Entry point of the ``mythos`` script."""
    app(prog_name="mythos")
