"""``mythos convert``: convert a checkpoint of the public reference implementation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_mythos.cli.console import console, mythos, note, progress, table
from open_mythos.fields import must

if TYPE_CHECKING:
    from open_mythos.integrations.upstream import Conversion


def convert(
    source: Annotated[
        Path, typer.Argument(help="A torch.save or safetensors file, or a folder with one and a config.json.")
    ],
    directory: Annotated[Path, typer.Argument(help="Output directory.")],
    config: Annotated[Path | None, typer.Option(help="Config file (JSON), if the checkpoint has none.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One field of that config, as in n_heads=8; may be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in DIRECTORY.")] = False,
) -> None:
    """Convert a checkpoint of the reference implementation (open-mythos 0.5.0) without running code from the file."""
    from open_mythos.checkpoint import CONFIG_FILE, WEIGHTS_FILE
    from open_mythos.cli.owned import may_replace_model
    from open_mythos.files import real
    from open_mythos.integrations.upstream import convert as convert_checkpoint
    from open_mythos.models import CARD, remove_beside

    with progress(n_steps=2) as begin:
        existing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (directory / name).exists()]
        held = f"{directory} already contains {' and '.join(existing)}"
        is_source = existing and real(directory) == real(source if source.is_dir() else source.parent)
        must(not is_source, f"{directory} contains the source; choose another directory")
        must(overwrite or not existing, f"{held}; choose another directory, or give --overwrite")
        may_replace_model(directory, is_agreed=overwrite)
        must(directory.is_dir() or not directory.exists(), f"{directory} is a file; give a directory")
        begin("converting")
        conversion = convert_checkpoint(source, config, settings or ())
        begin("writing")
        conversion.model.save_pretrained(directory)
        if existing:
            remove_beside(directory)
            (directory / CARD).unlink(missing_ok=True)
    show(conversion)
    note(
        f"Model: {directory}; its logits are those of the reference.",
        f"Next: {mythos('info', directory)}, {mythos('diagnose', directory)}, or "
        f'OpenMythos.from_pretrained("{directory}").generate(ids). Differences: docs/differences.md',
    )


def show(conversion: "Conversion") -> None:
    from open_mythos.diagnostics.cost import parameters
    from open_mythos.integrations.upstream.convert import SEMANTICS

    cfg = conversion.model.cfg
    shape = {
        "attention": f"{cfg.attn_type.upper()}, {cfg.n_heads} heads, rope_theta={cfg.rope_theta:g}",
        "width": f"{cfg.dim}",
        "layers": f"{cfg.prelude_layers} prelude, 1 recurrent, {cfg.coda_layers} coda",
        "experts": f"{cfg.n_experts} routed, {cfg.n_experts_per_tok} per token; {cfg.n_shared_experts} shared",
        "loops by default": f"{cfg.max_loop_iters}, act_threshold={cfg.act_threshold:g}",
        "parameters": f"{parameters(cfg).total:,}",
    }
    console.print(table("the reference's model", "", "", rows=shape.items()))
    fields = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in [*SEMANTICS, "loop_index_dim"])
    for title, lines in (("Folded", conversion.folded), ("Set", [fields]), ("Note", conversion.notes)):
        for line in lines:
            console.print(f"{title}: {line}")
