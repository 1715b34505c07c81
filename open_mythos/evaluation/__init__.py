"""Measuring what a model can do, and at what depth."""

from open_mythos.evaluation.depth import accuracy_by_loops as accuracy_by_loops
