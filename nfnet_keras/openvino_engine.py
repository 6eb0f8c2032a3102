"""A network on OpenVINO."""

import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable

import keras
import numpy as np

from nfnet_keras.folding import fold_weight_standardization
from nfnet_keras.layers.devices import usable_cores
from nfnet_keras.openvino_winograd import MIN_INPUTS, use_winograd

# To write what OpenVINO reads. Keras imports SciPy for it.
NEEDS = ("openvino", "scipy")


def openvino_engine(model: keras.Model, dtype: str) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Folds a network and hands it to OpenVINO.

    Args:
        model: A functional Keras model under TensorFlow; it is left as it is.
        dtype: `"float32"` or `"bfloat16"`, what is computed in.

    Returns:
        A function from a float32 batch to a float32 array for each output. Each new shape is compiled for.

    Example:

    >>> inputs = keras.Input((4, 4, 3))
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    >>> openvino_engine(model, "float32")(np.ones((2, 4, 4, 3), "float32"))[0].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    network = _network(model)
    compiled: dict[tuple, Callable] = {}

    def run(images: np.ndarray) -> list[np.ndarray]:
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

    >>> import_openvino().__name__
    'openvino'
    """
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:
        return importlib.import_module("openvino")
    sys.modules["openvino_telemetry"] = None  # Python's way to say that there is none
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]


@functools.cache
def openvino_core():
    """Returns OpenVINO's `Core`, one and the same for the whole process.

    Where the processor has AMX, a `Core` puts a stack for signal handlers in place of that of the thread which it first
    compiles in, and as it goes it puts the one before back and frees its own. When the first of two goes first, that of
    the second puts back what was freed, and the next Ctrl-C ends the process by a segmentation fault.

    Returns:
        `openvino.Core`, never freed.

    Raises:
        ImportError: If OpenVINO is not installed.

    Example:

    >>> openvino_core().available_devices[0]
    'CPU'
    """
    return import_openvino().Core()


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
        if not _is_mean_of_images(node):
            continue
        source = node.input_value(0)
        sides = list(source.get_partial_shape())[2:]
        if len(sides) != 2 or any(side.is_dynamic for side in sides):
            continue
        kernel = [side.get_length() for side in sides]
        pooled = op.avg_pool(source, [1, 1], [0, 0], [0, 0], kernel, True)
        if not node.get_attributes()["keep_dims"]:
            pooled = op.squeeze(pooled, np.array([2, 3]))
        node.output(0).replace(pooled.output(0))
    network.validate_nodes_and_infer_types()


def squeeze_first(network) -> None:
    """Takes means over height and width before a 1 x 1 convolution instead of behind it: the two commute.

    Squeeze-and-excitation looks at the means of a convolution that widens. Those of its input are fewer numbers to
    read, and what follows them is a product of matrices: two, where a fully connected layer comes next, made one here.

    Args:
        network: `openvino.Model` of a known input shape; it is changed.

    Example:

    >>> import openvino.opset8 as op
    >>> from openvino import Model
    >>> x, kernel = op.parameter([9, 2, 4, 4], np.float32), np.ones((3, 2, 1, 1), "float32")
    >>> y = op.convolution(x, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    >>> network = Model([op.reduce_mean(y, np.array([2, 3]), False)], [x])
    >>> squeeze_first(network)
    >>> [node.get_type_name() for node in network.get_ordered_ops() if node.get_type_name() != "Constant"]
    ['Parameter', 'ReduceMean', 'MatMul', 'Add', 'Result']
    """
    import openvino.opset8 as op

    for node in network.get_ordered_ops():
        found = _mean_of_pixel_convolution(node)
        if found is None:
            continue
        source, kernel, bias = found
        kernel, bias = kernel.astype("float64"), bias.astype("float64")
        readers = list(node.output(0).get_target_inputs())
        following = readers[0].get_node() if len(readers) == 1 else None
        matrix = _constant(following.input_value(1)) if following and following.get_type_name() == "MatMul" else None
        if matrix is not None and matrix.ndim == 2 and not following.get_attributes()["transpose_a"]:
            matrix = matrix if following.get_attributes()["transpose_b"] else matrix.T
            replaced, kernel, bias = following, matrix @ kernel, matrix @ bias
        else:
            replaced = node
            batch, _, *sides = source.get_shape()
            outputs, inputs = kernel.shape
            if batch * np.prod(sides) * (outputs - inputs) < kernel.size:
                continue  # the kernel, read once more, is more than what the means need not read
        means = op.reduce_mean(source, np.array([2, 3]), False)
        product = op.matmul(means, op.constant(kernel.astype("float32")), False, True)
        replaced.output(0).replace(op.add(product, op.constant(bias[None].astype("float32"))).output(0))
    network.validate_nodes_and_infer_types()


def sigmoid_gelus(network) -> None:
    """Computes the tanh approximation of GELU by a sigmoid: the two are the same function.

    `tanh(y) = 2 sigmoid(2 y) - 1`. Without AVX-512, OpenVINO's tanh takes five times as long as its sigmoid: more than
    is saved by running it together with a convolution, which it does with the one and not with the other.

    Args:
        network: `openvino.Model`; it is changed.

    Example:

    >>> import openvino.opset8 as op
    >>> from openvino import Model
    >>> x = op.parameter([9], np.float32)
    >>> network = Model([op.gelu(x, "tanh")], [x])
    >>> sigmoid_gelus(network)
    >>> sorted(node.get_type_name() for node in network.get_ops() if node.get_type_name() != "Constant")
    ['Add', 'Multiply', 'Multiply', 'Multiply', 'Multiply', 'Parameter', 'Result', 'Sigmoid']
    """
    import openvino.opset8 as op

    # Hendrycks & Gimpel 2016: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    linear = np.float32(2 * np.sqrt(2 / np.pi))
    cubic = np.float32(0.044715 * 2 * np.sqrt(2 / np.pi))
    for node in network.get_ordered_ops():
        if node.get_type_name() == "Gelu" and node.get_attributes()["approximation_mode"].lower() == "tanh":
            x = node.input_value(0)
            factor = op.add(op.multiply(op.multiply(x, x), op.constant(cubic)), op.constant(linear))
            node.output(0).replace(op.multiply(x, op.sigmoid(op.multiply(x, factor))).output(0))
    network.validate_nodes_and_infer_types()


def x86_vector_bits() -> int:
    """Returns how many bits OpenVINO computes with at once on an x86 processor: 512 with AVX-512, 256 without.

    Returns:
        512 or 256; 0 on any other processor.

    Example:

    >>> x86_vector_bits() in (0, 256, 512)
    True
    """
    core = openvino_core()
    if "intel64" not in core.get_property("CPU", "DEVICE_ARCHITECTURE"):
        return 0
    # OpenVINO computes in bfloat16 on all that have AVX-512.
    return 512 if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else 256


def _mean_of_pixel_convolution(node) -> tuple | None:
    """Returns input, kernel (outputs, inputs) and bias of the widening 1 x 1 convolution that a node is the mean of."""
    if not _is_mean_of_images(node) or node.get_attributes()["keep_dims"]:
        return None
    source, bias = node.input_value(0), np.zeros((1, 1, 1, 1), "float32")
    if source.get_node().get_type_name() == "Add":
        sides = [source.get_node().input_value(i) for i in range(2)]
        constants = [_constant(side) for side in sides]
        if (constants[0] is None) == (constants[1] is None):
            return None
        bias, source = next((c, sides[1 - i]) for i, c in enumerate(constants) if c is not None)
    convolution = source.get_node()
    kernel = _constant(convolution.input_value(1)) if convolution.get_type_name() == "Convolution" else None
    if kernel is None or kernel.shape[2:] != (1, 1) or len(kernel) < kernel.shape[1]:
        return None
    attributes = convolution.get_attributes()
    if any(list(attributes[name]) != [at] * 2 for name, at in (("strides", 1), ("pads_begin", 0), ("pads_end", 0))):
        return None
    if bias.ndim != 4 or bias.shape[0] != 1 or bias.shape[2:] != (1, 1):
        return None
    kernel = kernel.reshape(kernel.shape[:2])
    return convolution.input_value(0), kernel, np.broadcast_to(bias.reshape(-1), (len(kernel),))


def _is_mean_of_images(node) -> bool:
    """Whether a node takes means over height and width."""
    if node.get_type_name() != "ReduceMean":
        return False
    axes = _constant(node.input_value(1))
    return axes is not None and sorted(axes.reshape(-1).tolist()) == [2, 3]


def _constant(value) -> np.ndarray | None:
    node = value.get_node()
    return node.get_data() if node.get_type_name() == "Constant" else None


def _network(model: keras.Model):
    """Returns the folded network as OpenVINO's."""
    from nfnet_keras.exporting.operations import run_for

    core = openvino_core()  # imported here, before Keras imports OpenVINO with its telemetry
    folded = fold_weight_standardization(model, dtype="float32")
    inputs = keras.tree.map_structure(lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype), folded._inputs_struct)
    network = keras.Model(inputs, run_for(folded, inputs, "openvino"))
    with tempfile.TemporaryDirectory(prefix="nfnet_keras_") as folder:
        path = os.path.join(folder, "model.xml")
        network.export(path, format="openvino", verbose=False)
        # Weights are mapped from the file, which must not be gone while they are needed.
        return core.read_model(path).clone()


def _compiled(network, shape: tuple, dtype: str) -> Callable:
    # Cores that work together wait for each other at every layer; two halves of a batch wait once.
    parts = 2 if usable_cores() > 1 and shape[0] >= 4 and shape[0] % 2 == 0 else 1
    network = network.clone()
    network.reshape([shape[0] // parts, *shape[1:]])
    squeeze_first(network)
    pool_means(network)
    if dtype == "float32" and (vector_bits := x86_vector_bits()):
        # With AVX-512 products take half the time, and sums the same: with fewer inputs nothing is saved there.
        use_winograd(network, MIN_INPUTS if vector_bits < 512 else 2 * MIN_INPUTS)
        if vector_bits < 512:
            sigmoid_gelus(network)
    options = openvino_options(dtype)
    if parts > 1:
        options |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": parts}
    compiled = openvino_core().compile_model(network, "CPU", options)
    requests = [compiled.create_infer_request() for _ in range(parts)]

    def run(images: np.ndarray) -> list[np.ndarray]:
        for request, part in zip(requests, np.split(images, parts), strict=True):
            request.start_async(part)
        for request in requests:
            request.wait()
        # Copied: the engine gives its own memory, which the next call overwrites.
        return [
            np.concatenate([request.get_output_tensor(i).data for request in requests], dtype="float32")
            for i in range(len(compiled.outputs))
        ]

    return run
