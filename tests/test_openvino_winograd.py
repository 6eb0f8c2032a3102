"""Winograd's convolution on OpenVINO: the same numbers, and rows that are moved no more often than needed."""

import keras
import numpy as np
import pytest

from nfnet_keras import openvino_engine as engine
from nfnet_keras import openvino_winograd as winograd

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset8")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="OpenVINO takes TensorFlow's graphs")


def numbers(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype("float32")


def convolve(x, filters: int, size=(3, 3), groups: int = 1, stride: int = 1, dilation: int = 1, padding=None, seed=0):
    channels = x.get_output_shape(0)[1]
    kernel = numbers(groups, filters // groups, channels // groups, *size, seed=seed)
    kernel /= np.sqrt(kernel[0, 0].size)
    padding = [at // 2 * dilation for at in size] if padding is None else padding
    options = [stride] * 2, padding, padding, [dilation] * 2
    if groups == 1:
        return op.convolution(x, op.constant(kernel[0]), *options)
    return op.group_convolution(x, op.constant(kernel), *options)


# Inputs of a group: the tests' networks are small.
LEAST = 4


def image(channels: int, height: int, width: int = 5, batch: int = 2):
    return op.parameter([batch, channels, height, width], np.float32)


def run(network, x: np.ndarray) -> list[np.ndarray]:
    compiled = engine.openvino_core().compile_model(network, "CPU", engine.openvino_options("float32"))
    return [np.array(each) for each in compiled(x).values()]


def check(outputs, x, replaced: int, atol: float = 2e-5):
    """Checks the number of convolutions replaced and what the network then computes; returns it."""
    network = openvino.Model(outputs if isinstance(outputs, list) else [outputs], [x])
    images = numbers(*x.get_output_shape(0))
    wanted = run(network, images)
    assert winograd.use_winograd(network, LEAST) == replaced
    for found, each in zip(run(network, images), wanted, strict=True):
        np.testing.assert_allclose(found, each, atol=atol * max(1.0, np.abs(each).max()))
    return network


def moves(network) -> int:
    """Returns how often rows change places."""
    splits = [node for node in network.get_ops() if node.get_type_name() == "Split"]
    return sum(len(node.outputs()) > 4 or len(node.outputs()) == node.get_input_shape(0)[2] for node in splits)


@pytest.mark.parametrize(("inputs", "least", "replaced"), [(63, 64, 0), (64, 64, 1), (127, 128, 0), (128, 128, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_too_few_inputs(inputs, least, replaced, groups):
    x = image(inputs * groups, 8)
    assert winograd.use_winograd(openvino.Model([convolve(x, 2 * groups, groups=groups)], [x]), least) == replaced


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("height", "products"), [(4, 4), (6, 4), (8, 6), (12, 6), (22, 4), (64, 6)])
def test_convolution(height, products, groups):
    x = image(12, height)
    network = check(convolve(x, 18, groups=groups), x, 1)
    kinds = [node.get_type_name() for node in network.get_ops()]
    assert kinds.count("Convolution") + kinds.count("GroupConvolution") == products


@pytest.mark.parametrize(
    "options",
    [
        {"height": 7},
        {"height": 2},
        {"channels": 3},
        {"channels": 8, "groups": 4},
        {"size": (1, 1)},
        {"size": (5, 5)},
        {"size": (3, 1)},
        {"stride": 2},
        {"dilation": 2},
        {"padding": [0, 0]},
        {"padding": [1, 0]},
    ],
    ids=str,
)
def test_what_stays_as_it_is(options):
    x = image(options.pop("channels", 8), options.pop("height", 8))
    check(convolve(x, 8, **options), x, 0)


def test_kernel_that_is_computed():
    x = image(4, 8)
    kernel = op.reduce_mean(op.reshape(x, np.array([10, 4, 4, 2]), False), np.array([0, 3]), False)
    kernel = op.multiply(op.reshape(kernel, np.array([4, 4, 1, 1]), False), op.constant(numbers(1, 1, 3, 3)))
    check(op.convolution(x, kernel, [1, 1], [1, 1], [1, 1], [1, 1]), x, 0)


def block(x, filters: int, seed: int, stride: int = 1):
    """A bottleneck with squeeze-and-excitation."""
    y = op.swish(x)
    shortcut = x
    if stride > 1:
        shortcut = op.avg_pool(y, [2, 2], [0, 0], [0, 0], [2, 2], True)
        shortcut = convolve(shortcut, 2 * filters, (1, 1), seed=seed)
    y = op.gelu(op.add(convolve(y, filters, (1, 1), seed=seed + 1), op.constant(numbers(1, filters, 1, 1))), "tanh")
    y = op.swish(convolve(y, filters, groups=2, stride=stride, seed=seed + 2))
    y = op.relu(convolve(y, filters, groups=2, seed=seed + 3))
    y = convolve(y, 2 * filters, (1, 1), seed=seed + 4)
    gate = op.sigmoid(op.reduce_mean(y, np.array([2, 3]), True))
    return op.add(shortcut, op.multiply(y, gate))


def test_rows_are_moved_where_stages_begin_and_end():
    x = image(16, 16, 12)
    y = convolve(x, 16, seed=1)
    for seed in (10, 20, 30):
        y = block(y, 8, seed)
    y = block(y, 12, 40, stride=2)
    for seed in (50, 60):
        y = block(y, 12, seed)
    y = op.reduce_mean(op.swish(y), np.array([2, 3]), False)
    network = openvino.Model([y], [x])
    engine.pool_means(network)
    images = numbers(2, 16, 16, 12)
    wanted = run(network, images)
    # The first, two in each block of a stage, and one where a stage begins.
    assert winograd.use_winograd(network, LEAST) == 1 + 6 + 1 + 4
    np.testing.assert_allclose(run(network, images)[0], wanted[0], atol=2e-5)
    # Into phases at the first; back where the pooling is; into phases on both paths of the next stage.
    assert moves(network) == 4


def test_rows_are_moved_once_for_two_paths():
    x = image(8, 8)
    shortcut, y = convolve(x, 16, (1, 1)), convolve(convolve(x, 8, (1, 1), seed=1), 8)
    network = check(op.add(shortcut, convolve(y, 16, (1, 1), seed=2)), x, 1)
    # the image, and the sum
    assert moves(network) == 2


def test_what_is_put_back_anyway_is_used():
    x = image(8, 8)
    y = convolve(x, 8)
    pooled = op.avg_pool(y, [2, 2], [0, 0], [0, 0], [2, 2], True)
    network = check([op.relu(pooled), op.relu(convolve(y, 16, (1, 1), seed=1))], x, 1)
    assert moves(network) == 2


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": [1, 1]}, {"size": (1, 3)}, {"size": (3, 1)}], ids=str)
def test_convolutions_that_need_rows_in_order(options):
    x = image(8, 8)
    check(convolve(convolve(x, 8), 8, **{"size": (1, 1), "seed": 1, **options}), x, 1)


def test_outputs_have_their_rows_in_order():
    x = image(8, 8)
    y = convolve(x, 8)
    first = op.relu(y)
    second = op.add(convolve(first, 8, seed=1), x)
    check([y, first, second, op.reshape(second, np.array([2, -1]), False)], x, 2)


@pytest.mark.parametrize(
    "shape", [(), (5,), (1, 5), (8, 5), (8, 1, 1), (8, 8, 5), (1, 8, 1, 1), (1, 1, 8, 1), (2, 8, 8, 5)]
)
@pytest.mark.parametrize("first", [True, False])
def test_sums_with_constants_of_all_shapes(shape, first):
    x = image(8, 8)
    pair = [convolve(x, 8), op.constant(numbers(*shape))]
    check(convolve(op.add(*(pair if first else pair[::-1])), 8, seed=1), x, 2)


def test_shapes_that_are_known_as_it_runs():
    x = image(8, 8)
    y = op.relu(convolve(x, 8))
    # As many numbers as are positive; which ones, a compiled network finds as it runs.
    found = op.gather(
        op.reshape(y, np.array([-1]), False), op.reshape(op.non_zero(y), np.array([-1]), False), np.array(0)
    )
    image_of_unknown_height = op.reshape(found, np.array([1, 1, -1, 4]), False)
    check([op.relu(image_of_unknown_height), op.relu(convolve(y, 8, seed=1))], x, 2)


def random_network(seed: int):
    """Any operations on tensors of the same batch, one after the other or across."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.choice([4, 6, 8, 12])), int(rng.integers(3, 8))
    x = image(8, height, width)
    tensors = [x]
    for at in range(14):
        y = tensors[-1] if rng.random() < 0.7 else tensors[rng.integers(len(tensors))]
        shape = y.get_output_shape(0)
        alike = [each for each in tensors if each.get_output_shape(0) == shape]
        kind = rng.choice(["3", "3", "3", "1", "act", "sum", "gate", "stride", "pool", "flip", "constant"])
        if kind == "3":
            y = convolve(y, 8, groups=int(rng.choice([1, 2])), seed=at)
        elif kind == "1":
            y = convolve(y, 8, (1, 1), seed=at)
        elif kind == "act":
            y = [op.swish, op.relu, op.tanh, op.sigmoid][rng.integers(4)](y)
        elif kind == "sum":
            y = op.multiply(op.add(y, alike[rng.integers(len(alike))]), op.constant(np.float32(0.7)))
        elif kind == "gate":
            means = op.avg_pool(y, [1, 1], [0, 0], [0, 0], list(shape[2:]), True)
            y = op.multiply(y, op.sigmoid(means))
        elif kind == "stride" and shape[2] >= 8:
            y = convolve(y, 8, ((1, 1), (3, 3))[rng.integers(2)], stride=2, seed=at)
        elif kind == "pool" and shape[2] >= 8:
            y = op.avg_pool(y, [1, 1], [1, 1], [1, 1], [3, 3], False)
        elif kind == "flip":
            y = op.concat(op.split(y, op.constant(np.int64(2)), 2).outputs()[::-1], 2)
        elif kind == "constant":
            y = op.add(y, op.constant(numbers(1, 1, shape[2], 1)))
        tensors.append(y)
    outputs = [tensors[-1], *(tensors[at] for at in rng.integers(1, len(tensors), 2))]
    return [op.relu(each) for each in outputs], x


@pytest.mark.parametrize("seed", range(12))
def test_any_network(seed):
    outputs, x = random_network(seed)
    network = openvino.Model(outputs, [x])
    images = numbers(*x.get_output_shape(0))
    wanted = run(network, images)
    replaced = winograd.use_winograd(network, LEAST)
    assert replaced > 0
    for found, each in zip(run(network, images), wanted, strict=True):
        np.testing.assert_allclose(found, each, atol=1e-4 * max(1.0, np.abs(each).max()))
    # It was not the same network twice.
    assert winograd.use_winograd(network, LEAST) == 0


@pytest.mark.parametrize(
    ("bits", "least", "dtype"),
    [
        (512, 128, "float32"),
        (256, 64, "bfloat16"),
        (0, None, "float32"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((256, 64, "float32"), (512, 128, "bfloat16"), (0, None, "bfloat16"))
        ),
    ],
)
def test_engine_uses_it_in_float32(bits, least, dtype, small_nfnet, monkeypatch):
    monkeypatch.setattr(engine, "x86_vector_bits", lambda: bits)
    counts, asked, gelus = [], [], []

    def use(network, least):
        asked.append(least)
        counts.append(winograd.use_winograd(network, LEAST))

    monkeypatch.setattr(engine, "use_winograd", use)
    monkeypatch.setattr(engine, "sigmoid_gelus", gelus.append)
    model = small_nfnet(input_shape=(32, 32, 3))
    rng = np.random.default_rng(3)
    for variable in model.variables:
        if variable.path.endswith("skip_gain"):
            variable.assign(rng.uniform(0.5, 1.0, variable.shape))
    images = numbers(4, 32, 32, 3)
    (found,) = engine.openvino_engine(model, dtype)(images)
    wanted = dtype == "float32" and bits > 0
    assert [count > 0 for count in counts] == [True] * wanted
    assert asked == [least] * wanted
    assert len(gelus) == (wanted and bits < 512)
    np.testing.assert_allclose(found, model(images), atol=1e-5 if dtype == "float32" else 0.05)
