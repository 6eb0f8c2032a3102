"""Published parameters and how their names map to this package's."""

from nfnet_keras.checkpoints.haiku import assign_haiku, haiku_names

__all__ = ["assign_haiku", "haiku_names"]
