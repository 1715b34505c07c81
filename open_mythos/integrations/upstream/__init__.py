"""Conversion of checkpoints of the public reference implementation, ``open-mythos`` 0.5.0, to models of this library.

A converted model gives the reference's logits up to rounding, at every number of loops, with a cache and without.
Intended differences are listed in ``docs/differences.md``.
"""

from open_mythos.integrations.upstream.convert import Conversion, convert

__all__ = ["Conversion", "convert"]
