"""What messages say of installing: from a checkout, as ``open-mythos`` on PyPI is another project. Imports nothing."""

UPDATE = "get the newer version (git pull in a checkout of this library) and install it again: pip install ."


def missing(need: str, extra: str) -> ImportError:
    """The error for an optional package that is not there: ``need`` in words, and the extra that brings it."""
    return ImportError(f'{need}; in a checkout of this library, run: pip install ".[{extra}]"')
