"""Decoding by C code that is compiled on this machine: see :mod:`open_mythos.generation.native.engine`."""
