"""Files of weights, read without running anything that is in them, and the key maps of the three peers."""

from fastrcnn.checkpoints.pretrained import pretrained_state

__all__ = ["pretrained_state"]
