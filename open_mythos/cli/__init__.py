"""The ``mythos`` command. Each subcommand is a function in a module of the same name (``train-gate``: ``train_gate``).

Subcommand modules are imported when called, and torch and matplotlib only when a command runs (in functions, or in
helper modules), so that ``--help`` and usage errors are instant.
"""

import contextlib
import logging
import os
import sys
import warnings
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from open_mythos import __version__
from open_mythos.cli.console import clear_errors, fail

COMMANDS = {
    "demo": "Train a small model and show its accuracy by loops.",
    "train": "Train and evaluate a model from a recipe.",
    "train-gate": "Train the halting gate of a trained model, with all other weights frozen.",
    "tokenize": "Tokenise text once, in parallel, to train on it many times.",
    "eval": "Measure accuracy over difficulty and loops, with depth metrics.",
    "report": "Write an HTML report of a run: curves, and every loop of an example.",
    "chat": "Talk to a text model, at any depth, and see every loop.",
    "retrofit": "Convert a pretrained decoder to a recurrent-depth model.",
    "export": "Export a model for transformers, with the source code to load it anywhere.",
    "compare": "Compare a looped model with four baselines that do not loop.",
    "info": "Show the cost of a variant or a checkpoint: parameters, FLOPs, cache.",
    "plan": "Plan the training of a model on many GPUs: layout, memory, traffic, time.",
    "convert": "Convert a checkpoint of the reference implementation.",
    "bench": "Measure how fast a model trains, prefills and decodes on this machine.",
    "diagnose": "Look inside a checkpoint, loop by loop.",
    "doctor": "Show what this machine has and lacks, or check that the files of a model or run are intact.",
}
EXAMPLES = {
    "demo": "mythos demo --seed 1",
    "train": "mythos train debug",
    "train-gate": "mythos train-gate parity-tiny --steps 60 --max-difficulty 24 --loops 24",
    "tokenize": "mythos tokenize stdlib --max-bytes 10000000",
    "eval": "mythos eval parity-tiny --difficulties 24,96 --loops 1,8,32,64",
    "report": "mythos report text-tiny",
    "chat": "mythos chat text-tiny --loops 8",
    "retrofit": "mythos retrofit HuggingFaceTB/SmolLM2-135M-Instruct",
    "export": "mythos export text-tiny runs/exported",
    "compare": "mythos compare debug --seeds 0",
    "info": "mythos info 1b",
    "plan": "mythos plan 10b --gpus 64 --memory 80 --tokens 300B",
    "convert": "mythos convert step_0030000.pt runs/converted",
    "bench": "mythos bench text-tiny --only decode",
    "diagnose": "mythos diagnose parity-tiny",
    "doctor": "mythos doctor",
}
"""Shown at the end of each command's help; each can be run as it is, but convert needs a checkpoint of that name."""
FIRST = """\
OpenMythos {version}: transformers that run the same block of weights in a loop. More loops solve harder problems.

Try first:
  mythos demo                    train a small model, and see what more loops gain
  mythos demo --pretrained       the same with a pretrained model from the package
  mythos doctor                  what this machine has, what is missing, what to expect
  mythos train parity --dry-run  what a training run would cost here
  mythos --help                  every command; the help of each ends with an example"""


class LazyCommand(TyperCommand):
    """A subcommand with one line of help, whose module is imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        single = typer.Typer(add_completion=False)
        python_name = self.name.replace("-", "_")
        run = getattr(import_module(f"{__name__}.{python_name}"), python_name)
        single.command(self.name, epilog=f"Example: {EXAMPLES[self.name]}")(clear_errors()(run))
        command, words = typer.main.get_command(single), list(args)
        for before, word in zip(["an argument", *words], words, strict=False):
            if not word or (word.startswith("--") and word.endswith("=")):
                fail(f"{word[:-1] or before} is empty; give it a value, or leave it out")
        takes_settings = any(parameter.name == "overrides" for parameter in command.params)
        try:
            context = command.make_context(info_name, args, parent, **extra)
        except Exception as error:  # click's exceptions; some versions of typer have their own copy of click
            if (said := getattr(error, "message", "")) and said.endswith(" is a file."):
                error.message = f"{said[:-1]}; give a directory, which does not have to exist"  # type: ignore[attr-defined]
            if said.endswith(" is a directory."):
                error.message = f"{said[:-1]}; give a file, such as {words[-1]}/report.html"  # type: ignore[attr-defined]
            key = getattr(error, "option_name", "").lstrip("-")
            if takes_settings and key:
                _, _, value = " ".join(words).partition(f"--{key}")
                said = value.lstrip(" =").partition(" ")[0] or "..."
                error.message = f"No such option: --{key}. Settings are written without dashes: {key}={said}"  # type: ignore[attr-defined]
            raise
        with clear_errors():
            for parameter in command.params:
                check_place(parameter.name, context.params.get(parameter.name))
        if takes_settings:
            options = {option for parameter in command.params for option in parameter.opts}
            for word in context.params["overrides"] or ():
                key, _, value = word.partition("=")
                if f"--{key}" in options:
                    raise typer.BadParameter(
                        f"{key} is an option, not a setting; write --{key} {value or '...'}", context
                    )
        return context


def check_place(name: str | None, value: Any) -> None:
    """Fail, before anything is computed, for a path that is a broken link, or an output path that cannot be written."""
    if not isinstance(value, Path):
        return
    if os.path.lexists(value) and not os.path.exists(value):
        fail(f"{value} is a broken symbolic link; give another path")
    if name not in ("out", "plots", "directory"):
        return
    with contextlib.suppress(FileNotFoundError):
        os.lstat(value)  # raises OSError for a name that is too long, and for a path below a file
    there = next(place for place in (value, *value.absolute().parents) if os.path.exists(place))
    if not os.access(there, os.W_OK):
        fail(f"{value} cannot be written: {there} is read-only; give another path")


class LazyGroup(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, line in COMMANDS.items():
            self.add_command(LazyCommand(name, callback=None, help=line))


app = typer.Typer(cls=LazyGroup, invoke_without_command=True, pretty_exceptions_show_locals=False)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def mythos(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Recurrent-depth transformers: more loops of the same weights for harder problems."""
    if context.invoked_subcommand is None:
        typer.echo(FIRST.format(version=__version__))


def main() -> None:
    """Entry point of the ``mythos`` script; silences warnings and logs of other libraries."""
    warnings.filterwarnings("ignore")
    for name in ("torch", "torch.utils._pytree", "torchao", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal's encoding may not have all characters of file names
    app(prog_name="mythos")
