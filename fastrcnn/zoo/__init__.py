"""The named models, MMDetection's configuration files and the published checkpoints."""

import fastrcnn.models  # noqa: F401  first: its face hands on builders from here
from fastrcnn.zoo.mmdet_config import from_mmdet_config
from fastrcnn.zoo.recipes import NAMES, RPNS, recipe

__all__ = ["NAMES", "RPNS", "from_mmdet_config", "recipe"]
