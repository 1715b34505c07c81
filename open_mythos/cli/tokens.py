"""Input tokens of ``mythos diagnose``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig

EXAMPLE_FILE = "example.json"
RANDOM_TOKENS, SEED = 64, 0


def choose_tokens(cfg: MythosConfig, checkpoint: Path, prompt: str | None) -> tuple[str, Tensor]:
    """The source of the tokens, and the tokens (1, T): the prompt, the checkpoint's example, or random ones."""
    example = checkpoint / EXAMPLE_FILE
    if prompt is not None:
        words = prompt.replace(",", " ").split()
        tokens = [int(word) if word.removeprefix("-").isdecimal() else word for word in words]
        return "prompt", as_tokens("--prompt", tokens, cfg)
    if example.is_file():
        return EXAMPLE_FILE, as_tokens(str(example), read_example(example), cfg)
    length = min(RANDOM_TOKENS, cfg.max_seq_len)
    generator = torch.Generator().manual_seed(SEED)
    return f"random, seed {SEED}", torch.randint(cfg.vocab_size, (1, length), generator=generator)


def read_example(path: Path) -> Any:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fix or remove it, or give --prompt") from error
    if not isinstance(data, dict) or not isinstance(data.get("tokens"), list):
        raise ValueError(f'{path} should hold {{"tokens": [...]}}; fix or remove it, or give --prompt')
    return data["tokens"]


def as_tokens(source: str, tokens: list[Any], cfg: MythosConfig) -> Tensor:
    """Validate ``tokens`` and make a (1, T) tensor."""
    high = cfg.vocab_size - 1
    if not tokens:
        raise ValueError(f"{source} holds no tokens; give integers from 0 to {high}, such as '1 2 1 1'")
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= high:
            raise ValueError(f"{source} holds {token!r}; tokens of this model are integers from 0 to {high}")
    return torch.tensor([tokens])
