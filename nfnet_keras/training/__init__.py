"""Training runs: recipes as values, and the program that follows them."""

from nfnet_keras.training.averaging import averaged_weights
from nfnet_keras.training.errors import TrainingError
from nfnet_keras.training.recipes import DIGITS, FOLDER, Recipe
from nfnet_keras.training.run import Settings, settings, train

__all__ = ["DIGITS", "FOLDER", "Recipe", "Settings", "TrainingError", "averaged_weights", "settings", "train"]
