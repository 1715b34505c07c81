"""What may not be here: packages (from a checkout, as ``open-mythos`` on PyPI is another project), and the network."""

import os
import socket
import sys
from contextlib import suppress
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

UPDATE = "get the newer version (git pull in a checkout of this library) and install it again: pip install ."


def missing(need: str, extra: str) -> ImportError:
    """The error for a missing optional package: the sentence ``need``, and the extra to install."""
    return ImportError(f'{need}; in a checkout of this library, run: pip install ".[{extra}]"')


def find_hub(seconds: float = 2.0) -> None:
    """Where the Hugging Face Hub does not answer in so many seconds, have its libraries look only at what lies here.

    By themselves they would ask for half a minute.
    """
    place = urlsplit(getproxies().get("https") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    answered = list[bool]()

    def ask() -> None:
        with suppress(OSError, ValueError):
            socket.create_connection((place.hostname, place.port or 443), seconds).close()
            answered.append(True)

    asking = Thread(target=ask, daemon=True)  # since looking up a name knows no limit of time
    asking.start()
    asking.join(seconds)
    if not answered:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
