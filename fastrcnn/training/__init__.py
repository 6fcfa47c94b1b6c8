"""Training."""

from fastrcnn.training.trainer import train

__all__ = ["train"]
