"""Synthetic reasoning problems. They know nothing of models."""
