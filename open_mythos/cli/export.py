"""``mythos export``: a model as a folder that transformers loads, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import clear_errors, console
from open_mythos.fields import must


def export(
    model: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    directory: Annotated[Path, typer.Argument(help="Where the folder goes; new or empty.")],
) -> None:
    """Write a model for transformers: weights, tokenizer, and the source that loads it where this package is not."""
    with clear_errors():
        from open_mythos.integrations.hf.export import export as write

        must(
            not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
            f"{directory} is there and not empty; choose another directory",
        )
        has_tokenizer = write(model, directory)
    what = "weights, tokenizer and source" if has_tokenizer else "weights and source; the model has no tokenizer"
    console.print(f"Written: {directory} ({what})", highlight=False, soft_wrap=True)
    console.print(
        f'Next: AutoModelForCausalLM.from_pretrained("{directory}", trust_remote_code=True, num_loops=8), or '
        f"[bold]lm_eval run --model hf --model_args pretrained={directory},trust_remote_code=True,num_loops=8[/bold]",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
