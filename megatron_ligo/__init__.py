"""Grow trained transformers into larger ones with learned, tensor- and pipeline-parallel linear maps."""

__version__ = "0.1.0"
