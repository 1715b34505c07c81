"""Export of a trained model for transformers: weights, tokenizer, and the source code to load it anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from open_mythos import files, weights
from open_mythos.checkpoint import PREFIX, SHARD, WEIGHTS_FILE, remove_earlier, stored
from open_mythos.fields import must
from open_mythos.integrations.hf.configuration_open_mythos import OpenMythosConfig
from open_mythos.integrations.hf.modeling_open_mythos import OpenMythosForCausalLM
from open_mythos.integrations.hf.remote_code import needed
from open_mythos.model import OpenMythos
from open_mythos.models import TRAINING_FILE, load_model, model_dir
from open_mythos.tasks import tokenizer
from open_mythos.training import checkpoints
from open_mythos.training.fit import averaged, save_beside


def export(source: str | Path, directory: str | Path, max_shard_size: int | str = SHARD) -> bool:
    """Write a model into ``directory``.

    A checkpoint's averaged weights are read from whichever of its files hold them, one tensor at a time: no more is
    ever in memory, however large the model.

    Args:
        source: what :func:`~open_mythos.models.model_dir` finds, or a checkpoint of a run.
        directory: as above.
        max_shard_size: as in :meth:`~open_mythos.OpenMythos.save_pretrained`.

    Returns:
        Whether the model has a tokenizer, which is then written too.

    Raises:
        ValueError: if there is no such model, or it is a baseline without a loop.
        OSError: if it cannot be written; partial files are removed.
    """
    most, cfg = weights.n_bytes(max_shard_size), None
    if checkpoints.is_one(Path(source)):
        core, tensors, cfg = averaged(Path(source))
    else:
        core = load_model(source)
        tensors = stored(core)
    must(type(core) is OpenMythos, f"{source} is a baseline, which has no loop; export a run with kind='looped'")
    n_bytes = sum(map(weights.size_of, tensors.values())) + sum(map(len, needed().values()))
    with files.replacing_folder(directory, room=n_bytes) as partial:
        try:
            if cfg is not None:
                save_beside(cfg, partial)
            has_tokenizer = _write(core, model_dir(source) if cfg is None else partial, partial)
            named = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
            made = weights.write_divided(partial / WEIGHTS_FILE, named, most)
            remove_earlier(partial, {path.name for path in made})
        except Exception as error:  # safetensors and tokenizers raise their own errors for a full disk
            if "os error" not in str(error):
                raise
            raise OSError(str(error)) from error
    return has_tokenizer


def _write(core: OpenMythos, home: Path, directory: Path) -> bool:
    """Write all but the weights: config and source of ``core``, and the files beside it in ``home``."""
    has_tokenizer, ends = (home / tokenizer.FILE).is_file(), {}
    if has_tokenizer:
        words = load_tokenizer(home, core.cfg.vocab_size)
        words.save_pretrained(directory)
        ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    before = OpenMythosConfig._auto_class, OpenMythosForCausalLM._auto_class
    try:
        OpenMythosConfig.register_for_auto_class()
        OpenMythosForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        lm = OpenMythosForCausalLM.wrap(core, **ends)
        if (home / GENERATION_CONFIG_NAME).is_file():  # of a retrofit, which may have several end tokens
            lm.generation_config = GenerationConfig.from_pretrained(home)
        lm.save_pretrained(directory, state_dict={})
        if (trained := home / TRAINING_FILE).is_file():  # needed by eval, report and train-gate
            files.write(directory / TRAINING_FILE, files.read_bytes(trained))
    finally:
        OpenMythosConfig._auto_class, OpenMythosForCausalLM._auto_class = before
    return has_tokenizer


def load_tokenizer(directory: str | Path, vocab_size: int) -> Any:
    """The tokenizer in ``directory``, with an end token and a padding token, as most tools require.

    If it names none, the end token is token 0, which stands for no text in any of this library's tokenizers.

    Raises:
        ValueError: if there is none that transformers reads, or it has more than the model's ``vocab_size`` tokens.
    """
    try:
        words = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(
            f"{directory} has no tokenizer (tokenizer.json) that transformers can read; use the directory of a text "
            f"model, or save its tokenizer there"
        ) from error
    n = len(words)
    said = f"the tokenizer in {directory} has {n} tokens and the model {vocab_size}; they do not belong together"
    must(n <= vocab_size, said)
    words.eos_token = words.eos_token or words.convert_ids_to_tokens(0)
    words.pad_token = words.pad_token or words.eos_token
    # As in this library's tokenizers, "<eos>" in a text is five characters; with a chat template, it must be a token.
    words.split_special_tokens = words.chat_template is None
    words.init_kwargs["split_special_tokens"] = words.split_special_tokens  # init_kwargs are what is saved
    return words
