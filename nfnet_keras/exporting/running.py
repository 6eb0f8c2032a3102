"""Files that `nfk.export` wrote, run by the programs that they are for."""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable

import numpy as np

from nfnet_keras.layers.devices import usable_cores
from nfnet_keras.openvino_engine import openvino_core, openvino_options

FORMATS = ("tf_saved_model", "onnx", "litert", "openvino")
"""The formats by Keras's names."""

SUFFIXES = {"onnx": ".onnx", "litert": ".tflite", "openvino": ".xml"}
"""What the names of files end in; a SavedModel is a folder."""

_OTHER_NAMES = {"savedmodel": "tf_saved_model", "saved_model": "tf_saved_model", "tflite": "litert"}


def format_of(filepath: str | os.PathLike, format: str | None = None) -> str:
    """Finds the format of an exported file: the one that is named, or what the file's name tells.

    Args:
        filepath: Path of the file or folder.
        format: One of `FORMATS`, `"savedmodel"` or `"tflite"`; `None` for what `filepath` ends in.

    Returns:
        One of `FORMATS`.

    Raises:
        ValueError: If there is no such format, or the path ends in what belongs to another.

    Example:

    >>> format_of("cats.tflite"), format_of("cats"), format_of("cats", "savedmodel")
    ('litert', 'tf_saved_model', 'tf_saved_model')
    """
    path = os.fspath(filepath)
    told = next((name for name, suffix in SUFFIXES.items() if path.lower().endswith(suffix)), None)
    if format is None:
        if told is None and os.path.splitext(path)[1]:
            raise ValueError(
                f"the name {path!r} tells no format: {', '.join(f'{s} is {n}' for n, s in SUFFIXES.items())}, a name "
                "without an ending is a SavedModel's folder; or say which with `format` (on the command line --format)"
            )
        return told or "tf_saved_model"
    name = _OTHER_NAMES.get(str(format).lower(), format)
    if name not in FORMATS:
        raise ValueError(f"there is no format {format!r}; there is: savedmodel, onnx, litert, openvino")
    if name in SUFFIXES and not path.endswith(SUFFIXES[name]):
        raise ValueError(f"a file in the format {name} has a name that ends in {SUFFIXES[name]}, unlike {path!r}")
    if name not in SUFFIXES and told:
        raise ValueError(f"a SavedModel is a folder; {path!r} is the name of a file in the format {told}")
    return name


def runtime_of(format: str) -> str | None:
    """Returns the name of the program that runs a format, `None` where it is not installed.

    Example:

    >>> runtime_of("tf_saved_model")
    'TensorFlow'
    """
    names = {"tf_saved_model": "TensorFlow", "onnx": "ONNX Runtime", "litert": "LiteRT", "openvino": "OpenVINO"}
    packages = {
        "tf_saved_model": ["tensorflow"],
        "onnx": ["onnxruntime"],
        "litert": ["ai_edge_litert", "tensorflow"],
        "openvino": ["openvino"],
    }
    return names[format] if any(map(importlib.util.find_spec, packages[format])) else None


def open_exported(filepath: str | os.PathLike, format: str | None = None) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Opens an exported network in the program that its format is for, on a CPU.

    Args:
        filepath: What `nfk.export` wrote.
        format: As for `nfk.export`; `None` for what `filepath` ends in.

    Returns:
        A function from float32 images of shape (batch, height, width, channels) to the list of the network's outputs.
        Where the file takes and gives integers, it converts them.

    Raises:
        ImportError: If the program is not installed.
        ValueError: If the format is unknown.

    Example:

    >>> import os, tempfile
    >>> import nfnet_keras as nfk
    >>> model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.GlobalAveragePooling2D()])
    >>> path = os.path.join(tempfile.mkdtemp(), "mean")
    >>> _ = nfk.export(model, path)
    >>> open_exported(path)(np.ones((2, 32, 32, 3), "float32"))[0].shape
    (2, 3)
    """
    format = format_of(filepath, format)
    if runtime_of(format) is None:
        package = {"onnx": "onnxruntime"}.get(format, format)
        raise ImportError(f'Running a file of the format {format} needs {package}: pip install "{package}"')
    openers = {"tf_saved_model": _saved_model, "onnx": _onnx, "litert": _litert, "openvino": _openvino}
    return openers[format](os.fspath(filepath))


def _saved_model(path: str) -> Callable:
    import tensorflow as tf

    loaded = tf.saved_model.load(path)

    def run(images: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in tf.nest.flatten(loaded.serve(tf.constant(images)))]

    return run


def _onnx(path: str) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # On its own it takes the machine's cores for its own, whichever of them this process may use.
    options.intra_op_num_threads = usable_cores()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _openvino(path: str) -> Callable:
    network = openvino_core().compile_model(path, "CPU", openvino_options("float32"))
    return lambda images: [np.array(output) for output in network([images]).values()]


def _litert(path: str) -> Callable:
    interpreter = _interpreter(path)
    signature = interpreter.get_signature_list()
    signature = signature[next(iter(signature))]
    runner = interpreter.get_signature_runner()
    taken = runner.get_input_details()[signature["inputs"][0]]
    given = runner.get_output_details()

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = runner(**{signature["inputs"][0]: _to_integers(images, taken)})
        return [_to_floats(outputs[name], given[name]) for name in sorted(outputs)]

    return run


def _interpreter(path: str):
    options = {"model_path": path, "num_threads": usable_cores()}
    if importlib.util.find_spec("ai_edge_litert") is not None:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter(**options)
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tf.lite.Interpreter(**options)


def _to_integers(values: np.ndarray, details: dict) -> np.ndarray:
    dtype = np.dtype(details["dtype"])
    if dtype.kind == "f":
        return values
    scale, zero = details["quantization"]
    limits = np.iinfo(dtype)
    return np.clip(np.round(values / scale) + zero, limits.min, limits.max).astype(dtype)


def _to_floats(values: np.ndarray, details: dict) -> np.ndarray:
    if values.dtype.kind == "f":
        return values
    scale, zero = details["quantization"]
    return ((values.astype(np.float32) - zero) * scale).astype(np.float32)


@contextlib.contextmanager
def quiet():
    """Keeps the converters' Python warnings, which are for their own authors, from the user.

    Example:

    >>> with quiet():
    ...     warnings.warn("np.object will be a scalar", FutureWarning)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
