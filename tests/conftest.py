"""Settings of the whole suite: one thread, and property tests that draw the same examples every time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("suite")
