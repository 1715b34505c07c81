"""``mythos convert``: a checkpoint of the public reference implementation as a model of this library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_mythos.cli.console import clear_errors, console, progress, table
from open_mythos.fields import must

if TYPE_CHECKING:
    from open_mythos.integrations.upstream import Conversion


def convert(
    source: Annotated[
        Path, typer.Argument(help="A file of torch.save or safetensors, or a folder with either and config.json.")
    ],
    directory: Annotated[Path, typer.Argument(help="Where the converted model goes.")],
    config: Annotated[
        Path | None, typer.Option(help="JSON of the reference's config, where the checkpoint has none.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One field of that config, as in n_heads=8; may be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that DIRECTORY holds.")] = False,
) -> None:
    """Turn a checkpoint of the reference implementation (open-mythos 0.5.0) into a model of this library.

    Weights and plain values are read; no code in a file is run.
    """
    from open_mythos.integrations.upstream import convert as convert_checkpoint

    with clear_errors(), progress(n_steps=2) as begin:
        check_directory(source, directory, overwrite)
        begin("converting")
        made = convert_checkpoint(source, config, settings or ())
        begin("writing")
        made.model.save_pretrained(directory)
    show(made)
    console.print(
        f"The model is in [bold]{directory}[/bold]; it gives the reference's logits.", highlight=False, soft_wrap=True
    )
    console.print(
        f"Next: [bold]mythos info {directory}[/bold], [bold]mythos diagnose {directory}[/bold], or "
        f'OpenMythos.from_pretrained("{directory}").generate(ids). What differs: docs/differences.md',
        highlight=False,
        soft_wrap=True,
    )


def check_directory(source: Path, directory: Path, overwrite: bool) -> None:
    """ValueError if the model would take the place of another that nobody has given up, or of its own source."""
    from open_mythos.checkpoint import CONFIG_FILE, WEIGHTS_FILE

    home = source if source.is_dir() else source.parent
    taken = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (directory / name).exists()]
    must(
        not (taken and directory.resolve() == home.resolve()), f"{directory} holds the source; choose another directory"
    )
    must(overwrite or not taken, f"{directory} holds {' and '.join(taken)}; choose another, or give --overwrite")
    must(directory.is_dir() or not directory.exists(), f"{directory} is a file; give a directory")


def show(made: Conversion) -> None:
    from open_mythos.diagnostics.cost import parameters

    cfg = made.model.cfg
    shape = table("the reference's model", "", "")
    experts = f"{cfg.n_experts} routed, {cfg.n_experts_per_tok} per token; {cfg.n_shared_experts} shared"
    for label, value in {
        "attention": f"{cfg.attn_type.upper()}, {cfg.n_heads} heads, rope_theta={cfg.rope_theta:g}",
        "width": f"{cfg.dim}",
        "layers": f"{cfg.prelude_layers} prelude, 1 recurrent, {cfg.coda_layers} coda",
        "experts": experts,
        "loops by default": f"{cfg.max_loop_iters}, act_threshold={cfg.act_threshold:g}",
        "parameters": f"{parameters(cfg).total:,}",
    }.items():
        shape.add_row(label, value)
    console.print(shape)
    for title, lines in (("Folded", made.folded), ("Set", _fields(made)), ("Note", made.notes)):
        for line in lines:
            console.print(f"{title}: {line}", highlight=False, markup=False)


def _fields(made: Conversion) -> list[str]:
    from open_mythos.integrations.upstream.convert import SEMANTICS

    cfg = made.model.cfg
    return [", ".join(f"{name}={getattr(cfg, name)!r}" for name in [*SEMANTICS, "loop_index_dim"])]
