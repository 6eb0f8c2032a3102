"""Weight standardization as TensorFlow trains it on a CPU: the numbers of the plain one, whatever computes it."""

import dataclasses

import keras
import numpy as np
import pytest

from nfnet_keras.layers import WSConv2D
from nfnet_keras.layers.grouped_conv2d import CPUConvolution
from nfnet_keras.layers.ws_conv2d import _floor, _standardize_with_gradient

tf = pytest.importorskip("tensorflow")
standardization = pytest.importorskip("nfnet_keras.tensorflow_standardization")
fusion = pytest.importorskip("nfnet_keras.tensorflow_fusion")
COMPILES = getattr(fusion, "compiles", None)
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")

SHAPE = (3, 3, 4, 6)


def kernel_with(flat: list[int]):
    """Returns a kernel some units of which have (next to) no variance."""
    kernel = np.random.default_rng(0).standard_normal(SHAPE).astype("float32") * np.linspace(
        0.5, 2, SHAPE[-1], dtype="float32"
    )
    for at, unit in enumerate(flat):
        kernel[..., unit] = 0.25 if at % 3 == 0 else (1e-4, 1e-9)[at % 3 - 1] * kernel[..., unit]
    return tf.constant(kernel)


def exact(kernel, gain, upstream, floor: float, added: float, scale: float) -> list:
    """The definition and its gradient, in float64."""
    kernel, gain, upstream = (np.asarray(each, "float64") for each in (kernel, gain, upstream))
    axes = (0, 1, 2)
    centred = kernel - kernel.mean(axes)
    energy = (centred**2).sum(axes)
    root = 1 / np.sqrt(np.maximum(energy, floor) + added)
    along = (upstream * centred).sum(axes)
    pull = np.where(energy > floor, root**2 * along, 0)
    of_kernel = (upstream - upstream.mean(axes) - centred * pull) * root * gain * scale
    return [centred * root * gain * scale, of_kernel, along * root * scale]


def close(found, wanted, tolerance=5e-6):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("way", ["by_operations", "by_xla", "by_batch_norm"])
@pytest.mark.parametrize("flat", [[], [1, 4, 0], list(range(SHAPE[-1]))], ids=len)
@pytest.mark.parametrize(("floor", "added", "scale"), [(1e-4, 0.0, 1.0), (2.0, 0.0, 1.0), (0.0, 1e-5 * 36, 1.7)])
def test_standardization_and_its_gradient(way, flat, floor, added, scale):
    if floor == 2.0 and not flat:
        pytest.skip("no unit is far above or below this floor")
    plain = _standardize_with_gradient(floor, added)
    makers = {
        "by_operations": lambda: standardization.by_operations(plain, scale),
        "by_xla": lambda: standardization.by_xla(plain, scale),
        "by_batch_norm": lambda: standardization.by_batch_norm(plain, 36, floor, added, scale),
    }
    found = makers[way]()
    kernel = kernel_with(flat)
    gain, upstream = tf.linspace(-1.0, 2.0, SHAPE[-1]), tf.random.stateless_normal(SHAPE, (1, 2))

    @tf.function
    def compute(kernel, gain, upstream):
        weights, kept = found.forward(kernel, gain)
        again = found.again(kernel, gain, kept)
        return [weights, *found.gradient(kernel, gain, kept, upstream)], again, found.plain(kernel, gain)

    results, again, plain_weights = compute(kernel, gain, upstream)
    wanted = exact(kernel, gain, upstream, floor, added, scale)
    close(results, wanted)
    close([again, plain_weights], [wanted[0]] * 2)


def test_batch_norm_is_taken_where_it_is_fast(monkeypatch):
    taken = []
    for name in ("by_operations", "by_xla", "by_batch_norm"):
        monkeypatch.setattr(standardization, name, lambda *_, name=name: taken.append(name))
    large, small = tf.ones((1, 1, 1024, 512)), tf.ones(SHAPE)
    for onednn in (True, False):
        monkeypatch.setattr(standardization, "uses_onednn", lambda onednn=onednn: onednn)
        for kernel in (large, small, tf.cast(small, tf.float64)):
            standardization.standardization_for(tf.multiply, kernel, 1e-4, 0.0, 1.0)
    assert taken == ["by_batch_norm", "by_batch_norm", "by_operations", "by_xla", "by_operations", "by_operations"]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("flat", [[], [1, 4, 0]], ids=len)
def test_floor_inside_of_a_layer(jit_compile, flat, monkeypatch):
    layer = WSConv2D(SHAPE[-1], 3, padding="same")
    x = tf.random.stateless_normal((2, 7, 6, 4), (1, 2))
    layer(x)
    layer.kernel.assign(kernel_with(flat))
    found = []
    for compiles in (COMPILES, lambda tensor: False):
        monkeypatch.setattr(fusion, "compiles", compiles)

        @tf.function(jit_compile=jit_compile, autograph=False)
        def compute(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(tf.sin(y))
            return [y, *tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])]

        found.append(compute(x))
    close(*found)


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"kernel_size": 1}, {"padding": "symmetric", "strides": 2}, {"dilation_rate": 2}],
    ids=str,
)
@pytest.mark.parametrize("arithmetic", [{}, {"epsilon": 20.0}, {"variance_epsilon": 1e-5, "scale": 1.7}], ids=str)
def test_second_derivatives(options, arithmetic, monkeypatch):
    layer = WSConv2D(8, **{"kernel_size": 3, "padding": "same", **options, **arithmetic})
    x = tf.random.stateless_normal((2, 6, 5, 4), (1, 2))
    layer(x)
    found = []
    for compiles in (COMPILES, lambda tensor: False):
        monkeypatch.setattr(fusion, "compiles", compiles)

        @tf.function(autograph=False)
        def compute(x):
            by = [x, *(v.value for v in layer.trainable_variables)]
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(tf.sin(layer(x, training=True)))
                loss = tf.add_n([tf.reduce_sum(tf.cos(gradient)) for gradient in inner.gradient(loss, by)])
            return outer.gradient(loss, by)

        found.append(compute(x))
    close(*found, tolerance=5e-5)


def test_a_frozen_kernel_has_no_gradient():
    layer = WSConv2D(8, 3, padding="same")
    layer.build((None, 6, 6, 4))
    layer.trainable = False

    @tf.function(autograph=False)
    def compute(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, x)

    graph = compute.get_concrete_function(tf.ones((2, 6, 6, 4))).graph
    backward = [op for op in graph.get_operations() if op.type == "PartitionedCall"][-1]
    assert [output.shape.as_list() for output in backward.outputs] == [[2, 6, 6, 4]]


def test_settings_tell_floor_from_addition():
    assert _floor((3, 3, 4, 6), 1e-4, None) == (1e-4, 0.0)
    assert _floor((3, 3, 4, 6), 1e-4, 1e-5) == (0.0, pytest.approx(36e-5))


@pytest.mark.parametrize("needed", ["both", "kernel"])
def test_how_gradients_are_ordered_changes_no_number(needed):
    settings = CPUConvolution((1, 1), (1, 1), "same", (1, 1), 1, "channels_last", (0, 0))
    way = standardization.by_operations(_standardize_with_gradient(1e-4, 0.0), 1.0)
    x, kernel, gain = tf.random.stateless_normal((2, 3, 3, 4), (1, 2)), kernel_with([])[:1, :1], tf.ones(SHAPE[-1])

    def gradients(order):
        function = standardization._standardized.__wrapped__(way, settings, False, order)

        @tf.function
        def compute(x, kernel):
            with tf.GradientTape() as tape:
                tape.watch([x, kernel] if needed == "both" else kernel)
                loss = tf.reduce_sum(tf.sin(function(x, kernel, gain)[0]))
            return tape.gradient(loss, [x, kernel] if needed == "both" else [kernel])

        found = compute.get_concrete_function(x, kernel)
        calls = [op for op in found.graph.get_operations() if op.type == "PartitionedCall"][1:]
        return found(x, kernel), calls

    together, calls = gradients("together")
    assert len(calls) == 1
    for order in ("apart", "in turn"):
        others, calls = gradients(order)
        for a, b in zip(together, others, strict=True):
            np.testing.assert_array_equal(a, b)
        # What nothing needs is not run, and must not be waited for either.
        assert len(calls) == (2 if needed == "both" else 1)
        waits = [set(call.control_inputs) & set(calls) for call in calls]
        assert any(waits) == (order == "in turn" and needed == "both")


def test_order_of_gradients():
    images, unknown = tf.TensorSpec((8, 4, 4, 16)), tf.TensorSpec((None, 4, 4, 16))
    for inputs, shape, order in (
        (images, (1, 1, 16, 128), "apart"),
        (images, (1, 1, 16, 1024), "together"),
        (unknown, (1, 1, 16, 1024), "apart"),
        (images, (1, 1, 2**12, 2**10), "in turn"),
    ):
        assert standardization._order(inputs, tf.TensorSpec(shape)) == order


@pytest.mark.parametrize("keeps", [False, True])
def test_a_standardised_kernel_is_kept_or_computed_again(keeps):
    settings = CPUConvolution((3, 3), (1, 1), "same", (1, 1), 1, "channels_last", (0, 0))
    way = standardization.by_operations(_standardize_with_gradient(1e-4, 0.0), 1.0)
    again = []
    counting = dataclasses.replace(way, again=lambda *given: again.append(1) or way.again(*given))
    x, kernel, gain = tf.random.stateless_normal((2, 5, 5, SHAPE[2]), (1, 2)), kernel_with([]), tf.ones(SHAPE[-1])

    def gradients(function):
        def compute(x, kernel, gain):
            with tf.GradientTape() as tape:
                tape.watch([x, kernel, gain])
                loss = tf.reduce_sum(tf.sin(function(x, kernel, gain)[0]))
            return tape.gradient(loss, [x, kernel, gain])

        return tf.function(compute)(x, kernel, gain)

    found = gradients(standardization._standardized.__wrapped__(counting, settings, keeps, "apart"))
    assert bool(again) != keeps
    plain = gradients(lambda x, kernel, gain: [settings(x, way.plain(kernel, gain))])
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "keeps"), [((2, 6, 6, 8), True), ((2, 6, 5, 8), False), ((1, 9, 9, 8), False)])
def test_a_standardised_kernel_is_kept_where_inputs_are_larger(shape, keeps, monkeypatch):
    monkeypatch.setattr(standardization, "has_narrow_vectors", lambda: False)
    kernel = tf.ones((3, 3, 8, 8))
    assert standardization._keeps(tf.ones(shape), kernel) == keeps


def test_a_standardised_kernel_and_batches_of_any_number(monkeypatch):
    monkeypatch.setattr(standardization, "has_narrow_vectors", lambda: False)
    kernel = tf.ones((3, 3, 8, 8))
    for shape, keeps in (((None, 6, 6, 8), True), ((None, 3, 3, 8), True), ((None, 3, 2, 8), False)):
        assert standardization._keeps(tf.TensorSpec(shape), kernel) == keeps
    assert not standardization._keeps(tf.TensorSpec((8, None, 6, 8)), kernel)


@pytest.mark.parametrize(("onednn", "narrow", "keeps"), [(True, True, False), (True, False, True), (False, True, True)])
def test_a_standardised_kernel_is_computed_again_without_avx512(onednn, narrow, keeps, monkeypatch):
    monkeypatch.setattr(standardization, "uses_onednn", lambda: onednn)
    monkeypatch.setattr(standardization, "has_narrow_vectors", lambda: narrow)
    assert standardization._keeps(tf.ones((2, 6, 6, 8)), tf.ones((3, 3, 8, 8))) == keeps
