"""A network → a file for other programs: SavedModel, ONNX, LiteRT, OpenVINO."""

from nfnet_keras.exporting.running import format_of, open_exported
from nfnet_keras.exporting.writing import Export, export

__all__ = ["Export", "export", "format_of", "open_exported"]
