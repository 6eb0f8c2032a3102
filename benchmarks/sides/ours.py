"""This package, on each of its backends."""

import os
from collections.abc import Callable

import numpy as np

from benchmarks.sides import Way, as_installed, need_device
from benchmarks.sides.serving import MatrixProduct, Side, serve


def _model(request: dict):
    """The network as a constructor makes it: kernels are standardised at every call."""
    import nfnet_keras as nfk

    size, name = request["size"], request["model"]
    return nfk.create_model(
        # The authors' networks take the same parameters.
        name.replace("timm_dm_", "") if request.get("arithmetic") == "authors" else name,
        weights=request["weights"],
        input_shape=(size, size, 3),
        classes=request["classes"],
        classifier_activation=None,
    )


def _folded(request: dict):
    """The network with constant kernels."""
    import nfnet_keras as nfk

    return nfk.fold_weight_standardization(_model(request), dtype=request["precision"])


def inference_makers() -> list[tuple[str, Callable]]:
    """The models that are measured, each with what makes it: (name, function of the request)."""
    return [("as built", _model), ("folded", _folded), ("openvino", _model)]


def inference_ways(device: str = "cpu", arithmetic: str = "timm") -> list[Way]:
    """Our ways to run a network.

    Args:
        device: On a GPU, where TensorFlow's pip packages for it may be missing, JAX and PyTorch run.
        arithmetic: "timm" or "authors".
    """
    if arithmetic == "authors":
        backend = "tensorflow" if device == "cpu" else "jax"
        return [
            _way(f"ours, {maker}, {backend}, as the authors compute", maker, backend, arithmetic=arithmetic)
            for maker in _names()
            if device == "cpu" or maker != "openvino"
        ]
    backends = ("tensorflow",) if device == "cpu" else ("jax", "torch")
    makers = [maker for maker in _names() if maker != "openvino"]
    ways = [_way(f"ours, {maker}, {backend}", maker, backend) for backend in backends for maker in makers]
    if device != "cpu":
        return [*ways, _way(f"ours, folded, {backends[0]}, bfloat16", "folded", backends[0], "bfloat16")]
    return [
        *ways,
        _way("ours, folded, tensorflow with XLA", "folded", "tensorflow", jit=True),
        _way("ours, folded, jax", "folded", "jax"),
        _way("ours, folded, torch", "folded", "torch"),
        _way("ours, Predictor on OpenVINO", "openvino", "tensorflow"),
        _way("ours, Predictor on OpenVINO, bfloat16", "openvino", "tensorflow", "bfloat16"),
    ]


def training_ways(device: str = "cpu") -> list[Way]:
    """Our ways to take a training step, with and without AGC."""
    backends = ("tensorflow",) if device == "cpu" else ("jax", "torch")
    ways = [_way(f"ours, {backend}, AGC", "", backend, agc=True) for backend in backends]
    return [*ways, *(_way(f"ours, {backend}, no AGC", "", backend, agc=False) for backend in backends)]


def _names() -> list[str]:
    return [name for name, _ in inference_makers()]


def _way(name: str, maker: str, backend: str, precision: str = "float32", arithmetic: str = "timm", **options) -> Way:
    given = {"maker": maker, "precision": precision, "arithmetic": arithmetic, **options}
    variables = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return Way(name, "benchmarks.sides.ours", "ours", given, variables, precision, arithmetic)


def versions() -> dict[str, str]:
    """Returns what runs: this package, Keras and the backend."""
    import importlib

    import keras

    import nfnet_keras

    library = importlib.import_module(keras.backend.backend())
    return {
        "nfnet_keras": nfnet_keras.__version__,
        "keras": keras.__version__,
        library.__name__: library.__version__,
    }


class Inference(Side):
    """The network's logits, compiled as the backend compiles a function of one input."""

    def __init__(self, request: dict):
        import keras

        self.versions = versions()
        self.model = dict(inference_makers())[request["maker"]](request)
        self.backend = keras.backend.backend()
        self.jit = request.get("jit", False)
        if request["maker"] == "openvino":
            import nfnet_keras as nfk

            self.call = nfk.Predictor(self.model, "openvino", request["precision"])
            del self.model
            self.place, self.wait = np.asarray, lambda result: None
        else:
            self.call = getattr(self, f"_{self.backend}")()

    def _tensorflow(self) -> Callable:
        import tensorflow as tf

        call = tf.function(lambda images: self.model(images, training=False), jit_compile=self.jit)
        self.place, self.wait = tf.constant, lambda result: result.numpy()
        return call

    def _jax(self) -> Callable:
        import jax

        variables = [
            [variable.value for variable in group]
            for group in (self.model.trainable_variables, self.model.non_trainable_variables)
        ]
        call = jax.jit(lambda variables, images: self.model.stateless_call(*variables, images, training=False)[0])
        self.place, self.wait = jax.numpy.asarray, jax.block_until_ready
        return lambda images: call(variables, images)

    def _torch(self) -> Callable:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.eval()
        self.place = lambda images: torch.from_numpy(images).to(device)
        self.wait = lambda result: torch.cuda.synchronize() if device == "cuda" else None

        def call(images):
            with torch.no_grad():
                return self.model(images, training=False)

        return call

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = self.place(np.ascontiguousarray(images))

    def run(self) -> None:
        self.result = self.call(self.images)
        self.wait(self.result)

    def outputs(self) -> np.ndarray:
        import keras

        self.run()
        return keras.ops.convert_to_numpy(self.result).astype(np.float32)


class Training(Side):
    """One training step, as `fit` takes it: cross-entropy, gradients, AGC, SGD with Nesterov momentum."""

    def __init__(self, request: dict):
        import keras

        import nfnet_keras as nfk

        self.versions = versions()
        self.model = _model(request)
        clip_factor = 0.01 if request["agc"] else None
        self.model.compile(
            nfk.optimizers.SGD_AGC(request["learning_rate"], weight_decay=None, clip_factor=clip_factor),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **({} if request["agc"] else {"clip_factor": None}),
        )
        self.losses = []

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def run(self) -> None:
        # The loss that is returned is the mean of the steps since the last reset.
        self.model.reset_metrics()
        logs = self.model.train_on_batch(self.images, self.labels, return_dict=True)
        self.losses.append(float(logs["loss"]))

    def outputs(self) -> np.ndarray:
        return np.array(self.losses[:3])


def _matrix_product(request: dict) -> Side:
    import keras

    backend, size = keras.backend.backend(), request["size"]
    a, b = (np.random.default_rng(seed).standard_normal((size, size), np.float32) for seed in range(2))
    a, b = (keras.ops.cast(keras.ops.convert_to_tensor(each), request["precision"]) for each in (a, b))
    if backend == "tensorflow":
        import tensorflow as tf

        product = tf.function(tf.linalg.matmul)
        return MatrixProduct(lambda: product(a, b)[0, 0].numpy(), versions())
    if backend == "jax":
        import jax

        product = jax.jit(jax.numpy.matmul)
        return MatrixProduct(lambda: jax.block_until_ready(product(a, b)), versions())
    import torch

    wait = torch.cuda.synchronize if a.is_cuda else (lambda: None)
    return MatrixProduct(lambda: (torch.mm(a, b), wait()), versions())


class Draw(Side):
    """Draws a network's parameters from a seed and writes them with timm's names; `versions` has the multiply-adds."""

    def __init__(self, request: dict):
        import keras

        import nfnet_keras as nfk
        from benchmarks import parameters
        from nfnet_keras.checkpoints.writing import save_checkpoint

        model = _model({**request, "weights": None})
        for index, variable in enumerate(model.weights):
            # Names of variables may be counted up, positions are not.
            rng = np.random.default_rng([request["seed"], index])
            variable.assign(parameters.draw(rng, variable.path, variable.shape))
        save_checkpoint(model, request["path"], "timm")
        self.versions = {"multiply_adds": nfk.multiply_adds(model), "keras": keras.__version__}


def prepare(request: dict) -> Side:
    """Makes the side that a request asks for."""
    import keras

    if request["kind"] != "draw":
        need_device(request["device"], keras.backend.backend())
    kinds = {"inference": Inference, "training": Training, "matrix": _matrix_product, "draw": Draw}
    return kinds[request["kind"]](request)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    as_installed("openvino")
    serve(prepare)
