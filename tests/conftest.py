"""Settings of all tests: one thread, property tests that draw the same examples every time, a cache of their own."""

import os
import tempfile

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("suite")
_cache = tempfile.TemporaryDirectory()
os.environ["OPEN_MYTHOS_CACHE"] = _cache.name
