"""A network on the fastest engine that a machine has for it."""

import importlib.util
from collections.abc import Callable

import keras
import ml_dtypes
import numpy as np

from nfnet_keras.folding import can_fold, fold_weight_standardization
from nfnet_keras.layers.devices import runs_on_cpu
from nfnet_keras.openvino_engine import NEEDS, openvino_engine
from nfnet_keras.shapes import fits

ENGINES = ("auto", "keras", "openvino")


class Predictor:
    """Runs a network for inference alone: folded, then compiled by Keras's backend or by OpenVINO.

    `model.predict` goes through what training needs too. This goes through the constants of a trained network: weight
    standardization is folded away (`fold_weight_standardization`), and on a CPU OpenVINO, where it is installed
    (`pip install "nfnet-keras[openvino]"`), lays the kernels out once and runs activations together with convolutions;
    in float32 on an x86 processor, it computes 3 x 3 convolutions of enough inputs by Winograd's algorithm. It takes
    some seconds to make one; each new batch size or image size takes one to some seconds more.

    Args:
        model: A functional Keras model of one input; it is left as it is, and later changes of it are not followed.
        engine: `"keras"`, `"openvino"`, or `"auto"` (default): OpenVINO where it is installed and Keras runs TensorFlow
            on a CPU, else Keras.
        dtype: `"float32"`, or `"bfloat16"` for twice the speed on processors that have it. The classifier's outputs
            are float32 in both. Defaults to `"float32"`.

    Attributes:
        engine: The engine that runs: `"keras"` or `"openvino"`.

    Raises:
        ImportError: If `engine="openvino"` and OpenVINO is not installed.
        ValueError: If `engine` or `dtype` is another, the model is not functional or has several inputs, or OpenVINO
            is asked for with Keras on JAX or PyTorch.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10)
    >>> nfk.Predictor(model, engine="keras")(np.zeros((2, 32, 32, 3), "float32")).shape
    (2, 10)
    """

    def __init__(self, model: keras.Model, engine: str = "auto", dtype: str = "float32"):
        if engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}. Received: engine={engine!r}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`dtype` must be 'float32' or 'bfloat16'. Received: dtype={dtype!r}")
        missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        installed = not missing
        if engine == "openvino" and missing:
            raise ImportError(
                f'The engine "openvino" needs {" and ".join(missing)}: pip install "nfnet-keras[openvino]". '
                'engine="keras" needs nothing more.'
            )
        readable = keras.backend.backend() == "tensorflow"
        if engine == "openvino" and not readable:
            raise ValueError(
                f"OpenVINO takes networks from Keras's TensorFlow backend; this is {keras.backend.backend()!r}. Set "
                'KERAS_BACKEND=tensorflow, or take engine="keras".'
            )
        openvino = engine == "openvino" or (engine == "auto" and installed and readable and runs_on_cpu())
        self.engine = "openvino" if openvino else "keras"
        self.dtype = dtype
        if not can_fold(model):
            raise ValueError(
                f"`Predictor` takes a built functional model. Received: {model!r}. A saved one is loaded with "
                "keras.models.load_model(path, compile=False)."
            )
        if len(model.inputs) != 1:
            raise ValueError(f"`Predictor` takes a model of one input. Received one of {len(model.inputs)}.")
        self._shape = tuple(model.inputs[0].shape)
        # One output is an array even where the model gives it in a list.
        self._structure = model.output if len(model.outputs) > 1 else model.outputs[0]
        self._run = (openvino_engine if self.engine == "openvino" else _keras)(model, dtype)

    def __call__(self, images: np.ndarray) -> np.ndarray | list | dict:
        """Returns the network's outputs for a batch of images.

        Args:
            images: Array of shape (batch, height, width, channels), preprocessed as the network asks for.

        Returns:
            float32 array of shape (batch, ...); of a model with several outputs, such as feature maps, as many in the
            list or dictionary that the model gives.

        Raises:
            ValueError: If the images have another shape than the model takes.
        """
        return keras.tree.pack_sequence_as(self._structure, self._outputs(images))

    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        images = np.ascontiguousarray(images, "float32")
        # OpenVINO would take any size.
        if not fits(images.shape, self._shape):
            raise ValueError(f"The model takes images of shape {self._shape}. Received: {images.shape}")
        return self._run(images)

    def predict(self, images: np.ndarray, batch_size: int = 8) -> np.ndarray | list | dict:
        """Returns the network's outputs for any number of images, `batch_size` at a time.

        Args:
            images: Array of shape (images, height, width, channels).
            batch_size: Images at once. Defaults to 8.

        Returns:
            float32 array of shape (images, ...), or several as for a batch.

        Raises:
            ValueError: If there is no image, `images` is no array of them, or `batch_size` is not positive.

        Example:

        >>> import nfnet_keras as nfk
        >>> model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10)
        >>> nfk.Predictor(model, engine="keras").predict(np.zeros((3, 32, 32, 3)), batch_size=2).shape
        (3, 10)
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}")
        images = np.asarray(images)
        if images.dtype.kind not in "biuf" and images.dtype != ml_dtypes.bfloat16:
            raise ValueError(f"`images` must be an array of numbers. Received one of {images.dtype}: {images!r:.80}")
        if not images.ndim or not images.size:
            raise ValueError(f"`images` must hold at least one image. Received an array of shape {images.shape}.")
        outputs = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            # The last batch is filled up: another size would be compiled anew.
            missing = min(batch_size, len(images)) - len(batch)
            filled = np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)]) if missing else batch
            outputs.append([each[: len(batch)] for each in self._outputs(filled)])
        joined = [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
        return keras.tree.pack_sequence_as(self._structure, joined)


def _keras(model: keras.Model, dtype: str) -> Callable:
    folded = fold_weight_standardization(model, dtype=dtype)

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = keras.tree.flatten(folded.predict_on_batch(images))
        return [keras.ops.convert_to_numpy(keras.ops.cast(each, "float32")) for each in outputs]

    return run
