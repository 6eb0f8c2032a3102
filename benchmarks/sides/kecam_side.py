"""The side of kecam (keras_cv_attention_models), on TensorFlow with Keras 2, as its page asks for."""

import os
import re
from importlib.metadata import version

import numpy as np

from benchmarks.sides import Way, need_device
from benchmarks.sides.serving import Side, serve

_NETWORKS = {
    **{f"timm_dm_nfnet_f{level}": f"NFNetF{level}" for level in range(7)},
    "timm_nfnet_l0": "NFNetL0",
    **{f"timm_eca_nfnet_l{level}": f"ECA_NFNetL{level}" for level in range(4)},
}
_CONVOLUTIONS = {"conv1": "deep_1", "conv2": "deep_2", "conv2b": "deep_3", "conv3": "deep_4"}
_LAYERS = {
    **{inner: f"{layer}_conv" for inner, layer in _CONVOLUTIONS.items()},
    "downsample.conv": "shortcut_conv",
    "attn_last.fc1": "se_1_conv",
    "attn_last.fc2": "se_2_conv",
    "attn_last.conv": "eca_conv1d",
    "skipinit_gain": "deep_gain",
}
_VARIABLES = {"TF_USE_LEGACY_KERAS": "1", "KECAM_BACKEND": "tensorflow"}


def inference_ways(model: str) -> list[Way]:
    """The ways of kecam to run a network: as a TensorFlow graph and through XLA.

    Args:
        model: timm's name of the network with "timm_" before it.

    Returns:
        The ways; none if kecam has no such network.
    """
    return [_way(xla) for xla in (False, True)] if model in _NETWORKS else []


def training_ways(model: str) -> list[Way]:
    """The ways of kecam to take a training step. It has no AGC: its step is one without."""
    return [_way(xla, ", no AGC") for xla in (False, True)] if model in _NETWORKS else []


def _way(xla: bool, more: str = "") -> Way:
    name = f"kecam, {'XLA' if xla else 'graph'}{more}"
    return Way(name, "benchmarks.sides.kecam_side", "kecam", {"xla": xla}, _VARIABLES)


def layer_and_variable(name: str) -> tuple[str, str]:
    """Finds where a parameter of timm's is in kecam's network.

    Args:
        name: Key of timm's state dictionary.

    Returns:
        (name of the layer, name of its variable).
    """
    inner, _, parameter = name.rpartition(".")
    parameter = {"weight": "kernel"}.get(parameter, parameter)
    if found := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", name):
        inner = found[3].rpartition(".")[0] or found[3]
        if inner == "skipinit_gain":
            parameter = "gain"
        return f"stack{int(found[1]) + 1}_block{int(found[2]) + 1}_{_LAYERS[inner]}", parameter
    if found := re.fullmatch(r"stem\.conv(\d)", inner):
        return f"stem_{found[1]}_conv", parameter
    return {"final_conv": "post_conv", "head.fc": "predictions"}[inner], parameter


def _from_timm(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turns timm's order of axes (outputs, inputs, height, width) into TensorFlow's."""
    if len(shape) < 2:
        return array.reshape(shape)
    spatial = tuple(range(2, array.ndim))
    return array.transpose(*spatial, 1, 0).reshape(shape)


class KecamSide(Side):
    """A network of kecam."""

    def __init__(self, request: dict):
        # kecam first: it chooses the Keras that TensorFlow brings.
        import keras_cv_attention_models as kecam
        import tensorflow as tf
        from keras_cv_attention_models import nfnets
        from safetensors.numpy import load_file

        need_device(request["device"], "tensorflow")
        self.tf, self.xla = tf, request["xla"]
        self.versions = {"kecam": kecam.__version__, "tensorflow": tf.__version__, "tf-keras": version("tf-keras")}
        size = request["size"]
        self.model = getattr(nfnets, _NETWORKS[request["model"]])(
            input_shape=(size, size, 3),
            num_classes=request["classes"],
            classifier_activation=None,
            dropout=0,
            pretrained=None,
        )
        self._load(load_file(request["weights"]))

    def _load(self, arrays: dict[str, np.ndarray]) -> None:
        left = {id(variable) for variable in self.model.weights}
        for name, array in arrays.items():
            layer, parameter = layer_and_variable(name)
            variable = {v.name.rpartition("/")[2].partition(":")[0]: v for v in self.model.get_layer(layer).weights}[
                parameter
            ]
            variable.assign(_from_timm(array, tuple(variable.shape)))
            left.remove(id(variable))
        if left:
            raise ValueError(f"{len(left)} variables of kecam's network have no parameter in the file")


class Inference(KecamSide):
    """The network's logits."""

    def __init__(self, request: dict):
        super().__init__(request)
        self.call = self.tf.function(lambda images: self.model(images, training=False), jit_compile=self.xla)

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = self.tf.constant(images)

    def run(self) -> None:
        self.result = self.call(self.images).numpy()

    def outputs(self) -> np.ndarray:
        self.run()
        return self.result


class Training(KecamSide):
    """One training step: cross-entropy, gradients, Keras's SGD with Nesterov momentum."""

    def __init__(self, request: dict):
        super().__init__(request)
        keras = self.tf.keras
        self.model.compile(
            keras.optimizers.SGD(request["learning_rate"], momentum=0.9, nesterov=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=self.xla,
        )
        self.losses = []

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        # `train_on_batch` makes a data set for each step, and may wait for its tuning thread as it goes: nearly as
        # long again as the step takes.
        options = self.tf.data.Options()
        options.autotune.enabled = False
        data = self.tf.data.Dataset.from_tensors((images, labels)).repeat().with_options(options)
        self.batches, self.step = iter(data), self.model.make_train_function()

    def run(self) -> None:
        self.model.reset_metrics()
        self.losses.append(float(self.step(self.batches)["loss"]))

    def outputs(self) -> np.ndarray:
        return np.array(self.losses[:3])


def prepare(request: dict) -> Side:
    """Makes the side that a request asks for."""
    return {"inference": Inference, "training": Training}[request["kind"]](request)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    serve(prepare)
