"""``mythos export``: write a model as a folder that transformers loads on any machine."""

from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import note
from open_mythos.fields import must


def export(
    model: Annotated[
        str, typer.Argument(help="A run, a run's checkpoint, a model's directory, or the name of a shipped model.")
    ],
    directory: Annotated[Path, typer.Argument(help="Output directory; new or empty.")],
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum size of a weight file, as in 5GB.")
    ] = "50GB",
) -> None:
    """Export a model for transformers: weights, tokenizer, and source code that loads it without this package."""
    from open_mythos.files import is_partial
    from open_mythos.integrations.hf.export import export as write

    is_free = not directory.exists() or (directory.is_dir() and all(map(is_partial, directory.iterdir())))
    must(is_free, f"{directory} exists and is not empty; choose another directory")
    has_tokenizer = write(model, directory, max_shard_size)
    content = "weights, tokenizer and source" if has_tokenizer else "weights and source; the model has no tokenizer"
    note(
        f"Written: {directory} ({content})",
        f'Next, in Python: AutoModelForCausalLM.from_pretrained("{directory}", trust_remote_code=True, num_loops=8)',
    )
