"""Estimates of training a model on GPUs, without having them: memory, traffic, time, and the fastest layout."""
