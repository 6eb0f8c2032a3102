"""WSConv2D: the golden numbers, every option of Conv2D, gradients, precision, saving."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from nfnet_keras.layers import GroupedConv2D, WSConv2D, standardize_kernel

BACKEND = keras.backend.backend()


def draw(shape, seed=0, scale=1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def standardized(kernel, gain=1.0, epsilon=1e-4) -> np.ndarray:
    kernel = np.asarray(kernel, np.float64)
    fan_in = np.prod(kernel.shape[:-1])
    variance = kernel.var(axis=(0, 1, 2))
    return gain * (kernel - kernel.mean(axis=(0, 1, 2))) / np.sqrt(np.maximum(fan_in * variance, epsilon))


def convolve(x, kernel, strides=(1, 1), padding="valid", dilation=(1, 1), groups=1) -> np.ndarray:
    """A convolution, channels last, by its definition."""
    size = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if padding == "same":
        pads = []
        for n, k, s in zip(x.shape[1:3], size, strides, strict=True):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], size, strides, strict=True))
    inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
    y = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for g in range(groups):
        part, weights = x[..., g * inputs : (g + 1) * inputs], kernel[..., g * outputs : (g + 1) * outputs]
        for i in range(height):
            for j in range(width):
                top, left = i * strides[0], j * strides[1]
                patch = part[:, top : top + size[0] : dilation[0], left : left + size[1] : dilation[1]]
                y[:, i, j, g * outputs : (g + 1) * outputs] = np.tensordot(patch, weights, 3)
    return y


def randomize(layer, seed=5) -> None:
    for i, variable in enumerate(layer.trainable_variables):
        variable.assign(draw(variable.shape, seed + i) + ("gain" in variable.name))


def close(got, reference, tolerance=1e-5) -> None:
    got, reference = ops.convert_to_numpy(got), np.asarray(reference)
    assert got.shape == reference.shape
    assert np.max(np.abs(got - reference)) <= tolerance * max(1.0, np.max(np.abs(reference)))


@pytest.mark.parametrize("index", range(5))
def test_golden(golden, gradients, index):
    numbers, prefix = golden("layers"), f"wsconv{index}"
    config = json.loads(str(numbers[f"{prefix}|config"]))
    layer = WSConv2D(**config)
    x = keras.Variable(numbers[f"{prefix}|x"])
    layer.build(x.shape)
    own = {"w": layer.kernel, "gain": layer.gain, "bias": layer.bias}
    for name, variable in own.items():
        variable.assign(numbers[f"{prefix}|p|c|{name}"])
    close(layer(ops.convert_to_tensor(x)), numbers[f"{prefix}|y"])
    found = gradients(lambda: ops.sum(ops.sin(layer(ops.convert_to_tensor(x)))), [x, *own.values()])
    close(found[0], numbers[f"{prefix}|dx"])
    for name, gradient in zip(own, found[1:], strict=True):
        close(gradient, numbers[f"{prefix}|dp|c|{name}"])


OPTIONS = [
    {},
    {"strides": 2},
    {"strides": 2, "padding": "same"},
    {"strides": 3, "padding": "same"},
    {"dilation_rate": 2},
    {"dilation_rate": 2, "padding": "same"},
    {"dilation_rate": (1, 2), "padding": "same"},
    {"kernel_size": (1, 3), "padding": "same"},
    {"kernel_size": 1, "strides": 2, "padding": "same"},
    {"groups": 2, "padding": "same"},
    {"groups": 5, "strides": 2, "padding": "same"},
    {"groups": 20, "padding": "same", "strides": 2},
    {"groups": 20, "padding": "valid", "kernel_size": 2},
    {"use_bias": False},
    {"activation": "relu"},
    {"epsilon": 100.0},
]


@pytest.mark.parametrize(
    ("options", "data_format"),
    [(options, "channels_last") for options in OPTIONS] + [(options, "channels_first") for options in OPTIONS[2::4]],
    ids=str,
)
def test_options(options, data_format):
    options = {"filters": 40, "kernel_size": 3, **options}
    layer = WSConv2D(**options, data_format=data_format)
    x = draw((2, 7, 8, 20))
    given = x if data_format == "channels_last" else x.transpose(0, 3, 1, 2)
    layer.build(given.shape)
    randomize(layer)
    kernel = standardized(
        ops.convert_to_numpy(layer.kernel), ops.convert_to_numpy(layer.gain), options.get("epsilon", 1e-4)
    )
    y = convolve(
        x, kernel, layer.strides, options.get("padding", "valid"), layer.dilation_rate, options.get("groups", 1)
    )
    if options.get("use_bias", True):
        y = y + ops.convert_to_numpy(layer.bias)
    else:
        assert layer.bias is None
    if options.get("activation"):
        y = np.maximum(y, 0)
    if data_format == "channels_first":
        y = y.transpose(0, 3, 1, 2)
    assert tuple(layer.compute_output_shape(given.shape)) == y.shape
    close(layer(given), y)


@pytest.mark.parametrize("layer_class", [WSConv2D, GroupedConv2D])
def test_channels_first_with_as_many_columns_as_filters(layer_class):
    # Keras's own addition of a bias takes the columns for the channels then.
    first = layer_class(8, 3, padding="same", data_format="channels_first", bias_initializer="normal")
    last = layer_class(8, 3, padding="same", data_format="channels_last")
    x = draw((2, 7, 8, 4))
    y = first(x.transpose(0, 3, 1, 2))
    last.build(x.shape)
    last.set_weights(first.get_weights())
    close(y, ops.convert_to_numpy(last(x)).transpose(0, 3, 1, 2))


def test_positional_arguments_are_those_of_conv2d():
    layer = WSConv2D(8, 3, (2, 2), "same", "channels_last", (1, 1), 2, "relu", False, "ones")
    plain = keras.layers.Conv2D(8, 3, (2, 2), "same", "channels_last", (1, 1), 2, "relu", False, "ones")
    config, expected = layer.get_config(), plain.get_config()
    for name in expected:
        if name != "name":
            assert config[name] == expected[name], name


def test_default_initializer_has_variance_one_over_fan_in():
    layer = WSConv2D(64, 3)
    layer.build((None, 8, 8, 64))
    kernel = ops.convert_to_numpy(layer.kernel)
    assert abs(kernel.var() * layer.fan_in - 1) < 0.05
    # Not truncated: one in 1,600 values of a normal distribution lies beyond 3.4 deviations, none of a truncated one.
    assert np.mean(np.abs(kernel) > 3.4 * kernel.std()) > 2e-4
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.gain), np.ones(64))


def test_epsilon_must_be_positive():
    with pytest.raises(ValueError, match="epsilon=0"):
        WSConv2D(4, 3, epsilon=0)
    with pytest.raises(ValueError):
        WSConv2D(4, 3, groups=3)


def test_gain_takes_regularizer_and_constraint():
    layer = WSConv2D(
        4, 1, gain_initializer="zeros", gain_regularizer=keras.regularizers.L2(0.5), gain_constraint="non_neg"
    )
    layer.build((None, 4, 4, 2))
    layer.gain.assign([1.0, -1.0, 0.0, 2.0])
    assert [float(loss) for loss in layer.losses] == pytest.approx([3.0])
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.gain.constraint(layer.gain)), [1, 0, 0, 2])


@pytest.mark.parametrize("options", [{"groups": 4}, {"groups": 4, "strides": 2, "data_format": "channels_first"}])
def test_split_groups_equal_the_grouped_op(monkeypatch, gradients, options):
    module = "nfnet_keras.layers.grouped_conv2d"
    if BACKEND == "tensorflow" and options.get("data_format"):
        pytest.skip("TensorFlow has no convolution with channels first on a CPU")
    layer = WSConv2D(24, 3, padding="same", **options)
    shape = (2, 9, 7, 16) if layer.data_format == "channels_last" else (2, 16, 9, 7)
    x = keras.Variable(draw(shape))
    layer.build(shape)
    randomize(layer)

    def results():
        found = gradients(lambda: ops.sum(ops.sin(layer(ops.convert_to_tensor(x)))), [x, *layer.trainable_variables])
        return [ops.convert_to_numpy(layer(ops.convert_to_tensor(x))), *found]

    calls = []
    original = ops.conv
    monkeypatch.setattr(ops, "conv", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    monkeypatch.setattr(f"{module}.runs_on_cpu", lambda: True)
    split = results()
    assert len(calls) == 2 * 4
    calls.clear()
    monkeypatch.setattr(f"{module}.runs_on_cpu", lambda: False)
    grouped = results()
    # Left to Keras's Conv2D.
    assert not calls
    for a, b in zip(split, grouped, strict=True):
        close(a, b)


@pytest.mark.parametrize("epsilon", [1e-4, 3.0])
@pytest.mark.parametrize("flat", ["none", "constant", "nearly"])
def test_gradient_of_standardization_equals_autodiff(gradients, flat, epsilon):
    values = draw((3, 2, 4, 6), 1, 0.3)
    if flat != "none":
        # Three of six channels at the floor.
        values[..., :3] = 0.7 + (0 if flat == "constant" else draw((3, 2, 4, 3), 2, 1e-4))
    kernel, gain = keras.Variable(values), keras.Variable(1 + draw((6,), 3))
    weights = ops.convert_to_tensor(draw(values.shape, 4))

    def with_gain():
        kernel_, gain_ = ops.convert_to_tensor(kernel), ops.convert_to_tensor(gain)
        return ops.sum(ops.sin(standardize_kernel(kernel_, gain_, epsilon)) * weights)

    def gain_outside():
        kernel_, gain_ = ops.convert_to_tensor(kernel), ops.convert_to_tensor(gain)
        return ops.sum(ops.sin(standardize_kernel(kernel_, None, epsilon) * gain_) * weights)

    assert float(ops.convert_to_numpy(with_gain())) == pytest.approx(
        float(ops.convert_to_numpy(gain_outside())), rel=1e-5
    )
    for a, b in zip(gradients(with_gain, [kernel, gain]), gradients(gain_outside, [kernel, gain]), strict=True):
        assert np.all(np.isfinite(a))
        close(a, b)


def test_gradient_of_standardization_equals_finite_differences(gradients):
    values, gain_values, weights = draw((2, 2, 3, 4), 1), 1 + draw((4,), 2), draw((2, 2, 3, 4), 3)
    values[..., 0] = 0.5 + 1e-4 * values[..., 0]
    kernel, gain = keras.Variable(values), keras.Variable(gain_values)
    got = gradients(
        lambda: ops.sum(
            ops.multiply(standardize_kernel(ops.convert_to_tensor(kernel), ops.convert_to_tensor(gain)), weights)
        ),
        [kernel, gain],
    )

    def loss(kernel, gain):
        return np.sum(standardized(kernel, gain) * weights)

    for position, (gradient, start) in enumerate(zip(got, (values, gain_values), strict=True)):
        expected = np.zeros(start.shape)
        for index in np.ndindex(start.shape):
            step = np.zeros(start.shape)
            step[index] = 1e-6
            arguments = [np.float64(values), np.float64(gain_values)]
            up, down = list(arguments), list(arguments)
            up[position], down[position] = arguments[position] + step, arguments[position] - step
            expected[index] = (loss(*up) - loss(*down)) / 2e-6
        close(gradient, expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's gradient is written out")
def test_gradient_of_standardization_when_compiled():
    import tensorflow as tf

    values = draw((3, 3, 4, 5), 1)
    values[..., :2] = 0.5 + 1e-4 * values[..., :2]
    kernel, gain = tf.Variable(values), tf.Variable(1 + draw((5,), 2))

    def both():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(standardize_kernel(kernel, gain)))
        return tape.gradient(loss, [kernel, gain])

    for jit in (False, True):
        for a, b in zip(both(), tf.function(both, jit_compile=jit)(), strict=True):
            close(b, a)


def test_numpy_kernels_can_be_standardized():
    kernel, gain = draw((3, 3, 4, 5)), draw((5,), 1)
    close(standardize_kernel(kernel), standardized(kernel))
    close(standardize_kernel(kernel, gain), standardized(kernel, gain))


@pytest.mark.parametrize("epsilons", [(1e-4, None), (1e-4, 1e-5)])
def test_no_mean_is_left(epsilons):
    # Positive inputs add up what is left, the same for all weights of a unit.
    kernel = draw((3, 3, 512, 64), scale=1 / 64) + 1 / 128
    left = np.sum(np.asarray(ops.convert_to_numpy(standardize_kernel(kernel, None, *epsilons)), np.float64), (0, 1, 2))
    assert np.sqrt(np.mean(left**2)) < 2e-6


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_standardizes_in_float32(policy):
    layer = WSConv2D(8, 3, groups=2, padding="same", dtype=policy)
    layer.build((None, 6, 6, 8))
    # In half precision, the differences between these weights would be rounded away.
    kernel = 64 + draw(layer.kernel.shape, 1, 0.01)
    layer.kernel.assign(kernel)
    exact = standardized(ops.convert_to_numpy(layer.kernel))
    got = ops.convert_to_numpy(ops.cast(layer.standardized_kernel(), "float32"))
    assert np.max(np.abs(got - exact)) < 0.005 * np.max(np.abs(exact))
    y = layer(draw((1, 6, 6, 8)))
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == "float32"
    reference = convolve(draw((1, 6, 6, 8)), exact, padding="same", groups=2)
    assert np.max(np.abs(ops.convert_to_numpy(ops.cast(y, "float32")) - reference)) < 0.05


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_has_gradients(gradients, policy):
    layer = WSConv2D(8, 3, groups=2, padding="same", dtype=policy)
    x = draw((1, 6, 6, 8))
    layer.build(x.shape)
    precise = WSConv2D(8, 3, groups=2, padding="same")
    precise.build(x.shape)
    precise.set_weights(layer.get_weights())
    for a, b in zip(
        gradients(lambda: ops.sum(ops.sin(ops.cast(layer(x), "float32"))), layer.trainable_variables),
        gradients(lambda: ops.sum(ops.sin(precise(x))), precise.trainable_variables),
        strict=True,
    ):
        assert a.dtype == np.float32
        close(a, b, 0.05)


def test_config_round_trip():
    layer = WSConv2D(
        12,
        (3, 1),
        strides=2,
        padding="same",
        groups=3,
        activation="relu",
        use_bias=False,
        kernel_initializer="ones",
        gain_initializer=keras.initializers.Constant(0.5),
        gain_regularizer=keras.regularizers.L1(0.1),
        gain_constraint=keras.constraints.NonNeg(),
        epsilon=1e-3,
        name="conv",
    )
    config = json.loads(json.dumps(layer.get_config()))
    copy = WSConv2D.from_config(config)
    assert copy.get_config() == layer.get_config()
    assert copy.epsilon == 1e-3
    copy.build((None, 8, 8, 6))
    np.testing.assert_array_equal(ops.convert_to_numpy(copy.gain), np.full(12, 0.5))


def test_lora(tmp_path):
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, WSConv2D(6, 3, groups=2, name="conv")(inputs))
    layer, x = model.get_layer("conv"), draw((2, 8, 8, 4))
    randomize(layer)
    before = ops.convert_to_numpy(layer(x))
    layer.enable_lora(2)
    close(layer(x), before)
    layer.lora_kernel_b.assign(draw(layer.lora_kernel_b.shape, 8))
    changed = ops.convert_to_numpy(layer(x))
    assert np.max(np.abs(changed - before)) > 0.01
    close(
        layer.standardized_kernel(), standardized(ops.convert_to_numpy(layer.kernel), ops.convert_to_numpy(layer.gain))
    )
    model.save(tmp_path / "lora.keras")
    close(keras.models.load_model(tmp_path / "lora.keras")(x), changed)
    model.save_weights(tmp_path / "lora.weights.h5")
    plain = keras.Model.from_config(keras.Model(inputs, WSConv2D(6, 3, groups=2, name="conv")(inputs)).get_config())
    plain.load_weights(tmp_path / "lora.weights.h5")
    close(plain(x), changed)
