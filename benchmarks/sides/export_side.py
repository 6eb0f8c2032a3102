"""A network of this package as `nfk.export` writes it, run by the program that the format is for."""

import os
import pathlib

import numpy as np

from benchmarks.sides import Way
from benchmarks.sides.ours import versions
from benchmarks.sides.serving import Side, serve

_PACKAGES = {"onnx": "onnxruntime", "litert": "ai_edge_litert", "openvino": "openvino"}


def ways() -> list[Way]:
    """Keras itself, and each format."""
    variables = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    names = {
        "ours, Keras, folded": {"format": "keras"},
        "ours, SavedModel": {"format": "tf_saved_model"},
        "ours, ONNX Runtime": {"format": "onnx"},
        "ours, LiteRT": {"format": "litert"},
        "ours, LiteRT int8": {"format": "litert", "quantize": "int8"},
        "ours, OpenVINO": {"format": "openvino"},
    }
    return [Way(name, __name__, "ours", options, variables) for name, options in names.items()]


class Exported(Side):
    """The network in a file; where `write` is asked for, it is written and nothing else."""

    def __init__(self, request: dict):
        self.versions = versions()
        if request["format"] == "keras":
            self.call = self._keras(request)
            return
        place = pathlib.Path(request["path"])
        if request.get("write"):
            self._write(request, place)
            return
        from nfnet_keras.exporting.running import open_exported

        self.call = open_exported(place, request["format"])
        if request["format"] in _PACKAGES:
            from importlib.metadata import version

            package = _PACKAGES[request["format"]]
            self.versions = {package: version(package)}

    def _model(self, request: dict):
        import nfnet_keras as nfk

        size = request["size"]
        return nfk.create_model(
            request["model"],
            weights=request["weights"],
            input_shape=(size, size, 3),
            classes=request["classes"],
            classifier_activation=None,
        )

    def _keras(self, request: dict):
        import keras
        import tensorflow as tf

        import nfnet_keras as nfk

        model = nfk.fold_weight_standardization(self._model(request))
        call = tf.function(lambda images: model(images, training=False))
        return lambda images: [keras.ops.convert_to_numpy(call(tf.constant(images)))]

    def _write(self, request: dict, place: pathlib.Path) -> None:
        import nfnet_keras as nfk

        options = {}
        if request.get("quantize"):
            with np.load(request["representative"]) as arrays:
                options |= {"quantize": request["quantize"], "representative_images": arrays["images"]}
        found = nfk.export(self._model(request), place, request["format"], **options)
        self.versions = {"agreement": found.agreement, "bytes": found.bytes}

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = np.ascontiguousarray(images)

    def run(self) -> None:
        self.result = self.call(self.images)[0]

    def outputs(self) -> np.ndarray:
        self.run()
        return self.result


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    serve(Exported)
