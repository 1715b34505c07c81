"""Install hints for error messages: from a checkout, as ``open-mythos`` on PyPI is another project."""

UPDATE = "get the newer version (git pull in a checkout of this library) and install it again: pip install ."


def missing(need: str, extra: str) -> ImportError:
    """The error for a missing optional package: the sentence ``need``, and the extra to install."""
    return ImportError(f'{need}; in a checkout of this library, run: pip install ".[{extra}]"')
