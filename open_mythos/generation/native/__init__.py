"""Decoding by C code that the machine's own compiler makes: see :mod:`open_mythos.generation.native.engine`."""
