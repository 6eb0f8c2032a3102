"""A network on OpenVINO."""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable

import keras
import numpy as np

from nfnet_keras.folding import fold_weight_standardization
from nfnet_keras.layers.devices import usable_cores


def openvino_engine(model: keras.Model, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Folds a network and hands it to OpenVINO.

    Args:
        model: A functional Keras model under TensorFlow; it is left as it is.
        dtype: `"float32"` or `"bfloat16"`, what is computed in.

    Returns:
        A function from a float32 batch to the float32 array of the first output. Each new shape is compiled for.

    Example:

    >>> inputs = keras.Input((4, 4, 3))
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    >>> openvino_engine(model, "float32")(np.ones((2, 4, 4, 3), "float32")).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    network = _network(model)
    compiled: dict[tuple, Callable] = {}

    def run(images: np.ndarray) -> np.ndarray:
        if images.shape not in compiled:
            compiled[images.shape] = _compiled(network, images.shape, dtype)
        return compiled[images.shape](images)

    return run


def import_openvino():
    """Imports OpenVINO without its telemetry.

    OpenVINO reports its import and every conversion to a web service, each time from a copy (fork) of the process that
    asked, TensorFlow's threads and all. Where it finds no package for that, it does without. One that the program
    imported before is left as it is.

    Returns:
        The package.

    Raises:
        ImportError: If it is not installed.

    Example:

    >>> import_openvino().Core().available_devices[0]
    'CPU'
    """
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:
        return importlib.import_module("openvino")
    sys.modules["openvino_telemetry"] = None  # Python's way to say that there is none
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]


def openvino_options(dtype: str) -> dict:
    """Returns what OpenVINO is told when it compiles a network for a CPU.

    Args:
        dtype: `"float32"` or `"bfloat16"`, what it computes in.

    Returns:
        OpenVINO's properties.

    Example:

    >>> openvino_options("bfloat16")["INFERENCE_PRECISION_HINT"]
    'bf16'
    """
    return {
        # On its own it leaves cores idle where it takes them for threads of one core.
        "INFERENCE_NUM_THREADS": usable_cores(),
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }


def pool_means(network) -> None:
    """Makes poolings of means over height and width, where these sizes are known.

    OpenVINO pools twice as fast as it takes means.

    Args:
        network: `openvino.Model`; it is changed.

    Example:

    >>> import openvino.opset8 as op
    >>> from openvino import Model
    >>> x = op.parameter([-1, 3, 4, 4], np.float32)
    >>> network = Model([op.reduce_mean(x, np.array([2, 3]), False)], [x])
    >>> pool_means(network)
    >>> sorted(node.get_type_name() for node in network.get_ops() if node.get_type_name() != "Constant")
    ['AvgPool', 'Parameter', 'Result', 'Squeeze']
    """
    import openvino.opset8 as op

    for node in network.get_ordered_ops():
        if node.get_type_name() != "ReduceMean" or node.input_value(1).get_node().get_type_name() != "Constant":
            continue
        source = node.input_value(0)
        axes = np.sort(node.input_value(1).get_node().get_data().reshape(-1))
        sides = list(source.get_partial_shape())[2:]
        if axes.tolist() != [2, 3] or len(sides) != 2 or any(side.is_dynamic for side in sides):
            continue
        kernel = [side.get_length() for side in sides]
        pooled = op.avg_pool(source, [1, 1], [0, 0], [0, 0], kernel, True)
        if not node.get_attributes()["keep_dims"]:
            pooled = op.squeeze(pooled, np.array([2, 3]))
        node.output(0).replace(pooled.output(0))
    network.validate_nodes_and_infer_types()


def _network(model: keras.Model):
    """Returns the folded network as OpenVINO's."""
    from nfnet_keras.exporting.operations import run_for

    openvino = import_openvino()
    folded = fold_weight_standardization(model, dtype="float32")
    inputs = keras.tree.map_structure(lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype), folded._inputs_struct)
    network = keras.Model(inputs, run_for(folded, inputs, "openvino"))
    with tempfile.TemporaryDirectory(prefix="nfnet_keras_") as folder:
        path = os.path.join(folder, "model.xml")
        network.export(path, format="openvino", verbose=False)
        # Weights are mapped from the file, which must not be gone while they are needed.
        return openvino.Core().read_model(path).clone()


def _compiled(network, shape: tuple, dtype: str) -> Callable:
    network = network.clone()
    network.reshape(list(shape))
    pool_means(network)
    compiled = import_openvino().Core().compile_model(network, "CPU", openvino_options(dtype))
    # A copy: the engine gives its own memory, which the next call overwrites.
    return lambda images: np.array(next(iter(compiled(images).values())), "float32")
