"""Data sets of the tasks in this folder, from the files in it."""

from pathlib import Path

import datasets


def parity(**_):
    return _load("parity.jsonl")


def source(**_):
    return _load("source.jsonl")


def _load(name):
    return {"test": datasets.Dataset.from_json(str(Path(__file__).with_name(name)), keep_in_memory=True)}
