"""A Keras network with random weights, for the suites that compare this package with itself and with EfficientNet."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from benchmarks.sides import Way, as_installed, need_device
from benchmarks.sides.ours import versions
from benchmarks.sides.serving import Side, serve

# By its name in keras.applications; the small one is for a run that only shows that everything works.
EFFICIENTNETS = EFFICIENTNET, SMALL_EFFICIENTNET = "EfficientNetB7", "EfficientNetB0"


def way(name: str, **options) -> Way:
    """Returns a way to run a network on TensorFlow, or on the backend in KERAS_BACKEND."""
    variables = {"KERAS_BACKEND": os.environ.get("KERAS_BACKEND", "tensorflow"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return Way(name, "benchmarks.sides.networks", "ours", options, variables)


def _make(request: dict):
    import keras

    import nfnet_keras as nfk

    keras.utils.set_random_seed(request["seed"])
    shape = (request["size"], request["size"], 3)
    if request["model"] in EFFICIENTNETS:
        return getattr(keras.applications, request["model"])(weights=None, input_shape=shape, classes=1000)
    return nfk.create_model(request["model"], weights=None, input_shape=shape, classes=1000)


def _compile(model, request: dict) -> None:
    """Compiles a network with the authors' optimizer; EfficientNet trains without AGC."""
    import nfnet_keras as nfk

    if request["model"] in EFFICIENTNETS:
        # As this package compiles its own on a CPU: as a graph.
        jit_compile = False if request["device"] == "cpu" else "auto"
        optimizer = nfk.optimizers.SGD_AGC(0.01, clip_factor=None)
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit_compile)
    else:
        model.compile(nfk.optimizers.SGD_AGC(0.01), "sparse_categorical_crossentropy")


class Libraries(Side):
    """Nothing but the libraries: what their memory is."""

    def __init__(self, request: dict):
        import keras

        keras.ops.convert_to_numpy(keras.ops.ones((8, 8)) @ keras.ops.ones((8, 8)))
        self.versions = versions()

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        return

    def run(self) -> None:
        return


class Network(Side):
    """One call of a method of `keras.Model` a run: `predict`, `predict_on_batch` or `train_on_batch`."""

    def __init__(self, request: dict):
        import keras

        need_device(request["device"], keras.backend.backend())
        self.versions = versions()
        self.method = request["kind"]
        self.model = _make(request)
        if self.method == "train_on_batch":
            _compile(self.model, request)

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def run(self) -> None:
        if self.method == "predict":
            self.result = self.model.predict(self.images, verbose=0)
        elif self.method == "predict_on_batch":
            self.result = self.model.predict_on_batch(self.images)
        else:
            self.result = float(np.asarray(self.model.train_on_batch(self.images, self.labels)).ravel()[0])

    def outputs(self) -> np.ndarray:
        return np.atleast_2d(self.result)


class Spread(Side):
    """Training steps of `fit` on one device, or mirrored over several virtual ones on the same cores."""

    def __init__(self, request: dict):
        import tensorflow as tf

        replicas = request["replicas"]
        if replicas > 1:
            processor = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * replicas)
        import nfnet_keras as nfk

        self.versions = versions()
        self.devices = nfk.distribution.make("mirrored" if replicas > 1 else "one")
        with self.devices.scope():
            self.model = _make(request)
            _compile(self.model, request)

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        import tensorflow as tf

        def read(shard: int, shards: int):
            data = tf.data.Dataset.from_tensor_slices((images, labels)).shard(shards, shard)
            return data.batch(len(images) // shards, drop_remainder=True).repeat()

        data = self.devices.feed(read, len(images))
        # Builds all that a training function needs.
        self.model.fit(data, steps_per_epoch=1, verbose=0)
        self.batches = iter(data)

    def run(self) -> None:
        self.loss = float(self.model.train_function(self.batches)["loss"])

    def outputs(self) -> np.ndarray:
        return np.array([self.loss])


class Saved(Side):
    """Writes what the command line needs: a `.keras` file and a picture."""

    def __init__(self, request: dict):
        import keras

        self.versions = versions()
        folder = pathlib.Path(request["folder"])
        _make(request).save(folder / "network.keras")
        picture = np.random.default_rng(request["seed"]).integers(0, 256, (375, 500, 3))
        keras.utils.save_img(folder / "picture.png", picture, scale=False)

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        return

    def run(self) -> None:
        return


def prepare(request: dict) -> Side:
    """Makes the side that a request asks for."""
    kinds: dict[str, Callable] = {"libraries": Libraries, "spread": Spread, "saved": Saved}
    return kinds.get(request["kind"], Network)(request)


if __name__ == "__main__":
    as_installed()
    serve(prepare)
