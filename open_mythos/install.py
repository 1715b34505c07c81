"""Around the library: its extras and how to install them, its cache folder, and the network.

Extras are installed from a checkout, as ``open-mythos`` on PyPI is another project.
"""

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

UPDATE = "update this library (git pull in its checkout) and install it again: pip install ."
EXTRAS = {
    "plots": ("pictures", ["matplotlib"]),
    "tasks": ("reasoning-gym's problems, BPE, Hugging Face data sets", ["reasoning-gym", "tokenizers", "datasets"]),
    "hf": ("transformers, PEFT, TRL, retrofit", ["transformers", "accelerate"]),
    "eval": ("the lm-evaluation-harness", ["transformers", "accelerate", "lm-eval"]),
    "quant": ("int8 weights", ["torchao"]),
    "loggers": ("logging to other tools", ["tensorboard", "trackio", "wandb"]),
}
"""The extras by name: what each is for, and the packages that it installs."""


def install_line(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install ".[{extra}]"'


def missing(need: str, extra: str) -> ImportError:
    """The error for a missing optional package: ``need`` says what needs it, and the message how to install it."""
    return ImportError(f"{need}; in a checkout of this library, run: {install_line(extra)}")


def cache_dir() -> Path:
    """The folder for compiled code and tokenised text. It may not exist yet, and may be removed at any time."""
    if own := os.environ.get("OPEN_MYTHOS_CACHE"):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is to be ignored, says the XDG specification
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "open_mythos"


def find_hub(seconds: float = 2.0) -> None:
    """Switch Hugging Face's libraries to offline mode if the Hub does not answer within ``seconds``.

    By themselves they would keep trying for half a minute.
    """
    place = urlsplit(getproxies().get("https") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    answered = list[bool]()

    def ask() -> None:
        with suppress(OSError, ValueError):
            socket.create_connection((place.hostname, place.port or 443), seconds).close()
            answered.append(True)

    asking = Thread(target=ask, daemon=True)  # since a DNS lookup has no timeout
    asking.start()
    asking.join(seconds)
    if not answered:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
