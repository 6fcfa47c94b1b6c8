"""The named models, MMDetection's configuration files and the published checkpoints."""

from fastrcnn.zoo.mmdet_config import from_mmdet_config
from fastrcnn.zoo.recipes import NAMES, RPNS, recipe

__all__ = ["NAMES", "RPNS", "from_mmdet_config", "recipe"]
