"""The pretrained model that a retrofit starts from: finding and loading it, and whether it is supported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from open_mythos.config import MODEL_TYPE
from open_mythos.fields import must
from open_mythos.install import find_hub, missing

_GGUF_HEAD = 1 << 26  # bytes of a GGUF file that hold all names

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def load_original(source: str | Path) -> tuple[Any, Any]:
    """A pretrained causal language model in float32 and eval mode, and its tokenizer.

    Args:
        source: a directory that transformers wrote, one with a single GGUF file, a GGUF file, or a name on the
            Hugging Face hub.

    Raises:
        ValueError: saying what is missing or not supported.
        ImportError: naming the extra to install, if transformers is missing.
    """
    if not Path(source).exists():
        find_hub()
    try:
        import transformers
    except ImportError as error:
        raise missing("retrofit needs transformers", "hf") from error
    directory, options = _located(Path(source)) if Path(source).exists() else (str(source), {})
    if options:
        check_gguf(Path(directory, options["gguf_file"]))
    try:
        with _quietly(transformers):
            if not options:  # for a GGUF file, reading the config takes as long as reading all of it
                check_kind(transformers.PreTrainedConfig.get_config_dict(directory)[0].get("model_type"), source)
                check_family(transformers.AutoConfig.from_pretrained(directory))
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
            except OSError:
                raise
            except Exception as error:  # tokenizers raises bare exceptions
                raise ValueError(
                    f"{source} has no tokenizer that transformers can read; put the tokenizer.json of the original "
                    f"beside its weights"
                ) from error
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True, **options
            )
    except OSError as error:
        what = (
            "cannot be read" if Path(source).exists() else "is not a directory, and no such model could be downloaded"
        )
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{source} {what} ({first_line}); give the path of a downloaded model") from error
    lacks = sorted(info["missing_keys"])  # transformers fills these with random numbers
    must(
        not lacks,
        f"{source} lacks tensors of a causal language model: {', '.join(lacks[:3])} ({len(lacks)} in all); download it "
        f"again, or give the model that it was made from",
    )
    n, most = len(tokenizer), model.config.vocab_size
    must(n <= most, f"the tokenizer of {source} has {n} tokens and the model {most}; they do not belong together")
    return model.eval(), tokenizer


def check_gguf(path: Path) -> None:
    """Raise ValueError for a GGUF file with a scaled rotary embedding, of which transformers reads nothing.

    Looks for its names in the head of the file, as parsing all of it takes seconds.
    """
    with path.open("rb") as file:
        head = file.read(_GGUF_HEAD)
    scaled = "rope_freqs.weight" if b"rope_freqs.weight" in head else None
    if (at := head.find(key := b"rope.scaling.type")) >= 0:  # then its kind, 8 for text, as 4 bytes, and a length as 8
        value = head[at + len(key) + 12 :][: int.from_bytes(head[at + len(key) + 4 :][:8], "little")]
        scaled = scaled if value == b"none" else f"rope.scaling.type={value.decode(errors='replace')!r:.40}"
    must(
        scaled is None,
        f"{path} scales its rotary embedding ({scaled}), which transformers does not read from a GGUF file; give the "
        f"directory of the model that it was made from, with its config.json and safetensors",
    )


def check_kind(kind: str | None, source: str | Path = "the original") -> None:
    """Raise ValueError for a ``model_type`` that is not Llama's, even one that transformers does not know."""
    must(kind != MODEL_TYPE, f"{source} is already a recurrent-depth model; train it with mythos train heal start=DIR")
    must(kind == "llama", f"the original is a {kind!r}; only the Llama family (model_type 'llama') is supported so far")


def check_family(config: Any) -> None:
    """Raise ValueError for a config whose layers compute something that this library's do not."""
    check_kind(config.model_type)
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    known = kind in ("default", "llama3")
    must(known, f"the original has rope_type={kind!r}; only 'default' and 'llama3' are supported so far")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, value, supported in (
        ("low_freq_factor", rope.get("low_freq_factor", 1.0), 1.0),
        ("high_freq_factor", rope.get("high_freq_factor", 4.0), 4.0),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
        ("hidden_act", config.hidden_act, "silu"),
        ("head_dim", head_dim, config.hidden_size // config.num_attention_heads),
    ):
        must(value == supported, f"the original has {name}={value!r}; only {name}={supported!r} is supported so far")


def _located(path: Path) -> tuple[Path, dict[str, str]]:
    """The directory, and loading options that name the GGUF file, if there is one."""
    if path.is_file():
        must(path.suffix == ".gguf", f"{path} is a file; give the model's directory, or a GGUF file")
        return path.parent, {"gguf_file": path.name}
    found = {pattern: sorted(path.glob(pattern)) for pattern in WEIGHTS}
    must(
        any(found.values()),
        f"{path} contains no weights ({', '.join(WEIGHTS)}); give the directory of a downloaded model",
    )
    if found["*.safetensors"] or found["*.bin"]:
        must((path / "config.json").is_file(), f"{path / 'config.json'} is missing; download it with the weights")
        return path, {}
    files = [file.name for file in found["*.gguf"]]
    must(len(files) == 1, f"{path} holds {len(files)} GGUF files ({', '.join(files)}); give the path of one")
    return path, {"gguf_file": files[0]}


@contextlib.contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Silence progress bars, and warnings of all libraries, inside the block."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers.utils.logging.enable_progress_bar()
