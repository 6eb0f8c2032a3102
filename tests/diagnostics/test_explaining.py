"""Grad-CAM against NumPy, against finite differences, and where it must point."""

import judge
import keras
import kinds
import numpy as np
import pytest
from keras import layers, ops

import nfnet_keras as nfk


def enlarged(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear enlargement, pixels at their centres, and division by the largest value; in NumPy."""

    def along(maps, size, axis):
        old = maps.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.minimum(place.astype(int), max(old - 2, 0))
        high = np.minimum(low + 1, old - 1)
        share = np.expand_dims(place - low, 1 if axis == 1 else 0)
        return np.take(maps, low, axis) * (1 - share) + np.take(maps, high, axis) * share

    maps = along(along(maps, height, 1), width, 2)
    return maps / np.maximum(maps.max((1, 2), keepdims=True), 1e-30)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    made = nfk.create_model("nfnet_tiny", weights=None, classes=4, input_shape=(96, 64, 3))
    # The first weights are N(0, 0.01^2), and skip gains zero.
    made.layers[-1].kernel.assign(30 * ops.convert_to_numpy(made.layers[-1].kernel))
    for layer in made.layers:
        if isinstance(layer, nfk.layers.SkipGain):
            layer.skip_gain.assign(0.7)
    return made


@pytest.fixture(scope="module")
def images():
    coarse = np.random.default_rng(0).standard_normal((3, 6, 4, 3), dtype="float32")
    return coarse.repeat(16, 1).repeat(16, 2)


def features(model, layer: str, x) -> np.ndarray:
    return judge.outputs(keras.Model(model.inputs[0], model.get_layer(layer).output), x)


def test_the_last_layer_by_hand(model, images):
    """Behind it are an average and a matrix: the gradient is a column of the matrix over the number of positions."""
    maps, kernel = features(model, "final_act", images), ops.convert_to_numpy(model.layers[-1].kernel)
    assert maps.shape[1:3] == (3, 2)
    for chosen in (2, [1, 3, 0]):
        columns = kernel[:, np.broadcast_to(chosen, 3)].T
        wanted = np.maximum(np.einsum("nhwc,nc->nhw", maps, columns), 0)
        got = nfk.grad_cam(model, images, chosen)
        assert got.dtype == np.float32 and got.shape == (3, 96, 64)
        np.testing.assert_allclose(got, enlarged(wanted, 96, 64), atol=1e-4)
        assert np.mean(got > 0) > 0 and got.max() == 1


def test_a_layer_in_the_middle_by_finite_differences(model, images):
    """The average gradient by a channel is how the score changes when the whole channel is raised."""
    layer, chosen, step = "stage3_block1_add", 1, 0.05
    cut = model.get_layer(layer).output
    head = keras.Model(cut, model.get_layer("avg_pool").output)
    maps = features(model, layer, images)[:1]
    raised = step * np.eye(maps.shape[-1], dtype="float32")[:, None, None, :]
    column = ops.convert_to_numpy(model.layers[-1].kernel)[:, chosen]
    up, down = (judge.outputs(head, maps + sign * raised).astype("float64") @ column for sign in (1, -1))
    weights = (up - down) / (2 * step)
    wanted = enlarged(np.maximum(maps @ weights, 0), 96, 64)
    np.testing.assert_allclose(nfk.grad_cam(model, images[:1], chosen, layer=layer), wanted, atol=0.02)
    assert wanted.std() > 0.1
    by_layer = nfk.grad_cam(model, images[:1], chosen, layer=model.get_layer(layer))
    np.testing.assert_allclose(by_layer, wanted, atol=0.02)


def classifier(*last):
    """A network in which each class is a colour: an identity and an average."""
    keras.utils.set_random_seed(0)
    first = layers.Conv2D(3, 1, name="see")
    model = keras.Sequential([keras.Input((32, 40, 3)), first, layers.GlobalAveragePooling2D(), *last])
    first.set_weights([np.eye(3)[None, None], np.zeros(3)])
    return model


def corners() -> np.ndarray:
    """An image with a red, a green and a blue corner."""
    image = np.zeros((1, 32, 40, 3), "float32")
    image[0, :8, :10, 0] = image[0, :8, 30:, 1] = image[0, 24:, 30:, 2] = 5
    return image


def dense(activation=None):
    return layers.Dense(3, activation, kernel_initializer="identity")


ENDS = {
    "logits": lambda: [dense()],
    "softmax": lambda: [dense("softmax")],
    "sigmoid": lambda: [dense("sigmoid")],
    "Softmax": lambda: [dense(), layers.Softmax()],
    "Activation": lambda: [dense(), layers.Activation("softmax")],
}


@pytest.mark.parametrize("end", ENDS)
def test_only_the_corner_of_the_class_is_hot(end):
    """Of logits: by the probability, a class would be seen where the others are not, too."""
    model = classifier(*ENDS[end]())
    for chosen, (rows, columns) in enumerate(((slice(8), slice(10)), (slice(8), slice(30, 40)), (slice(24, 32),) * 2)):
        corner = np.zeros((1, 32, 40), "float32")
        corner[0, rows, columns if chosen < 2 else slice(30, 40)] = 1
        np.testing.assert_allclose(nfk.grad_cam(model, corners(), chosen), corner, atol=1e-6)


def test_probabilities_have_the_map_of_their_logits(images):
    maps = []
    for activation in (None, "softmax"):
        keras.utils.set_random_seed(3)
        model = kinds.make("nf_resnet50", classes=5, classifier_activation=activation)
        maps.append(nfk.grad_cam(model, np.resize(images, (2, 64, 64, 3)), [4, 0], layer="stage2_block2_add"))
        assert (model.layers[-1].activation is keras.activations.softmax) == (activation == "softmax")
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-5)


def test_without_a_class_the_likeliest(model, images):
    likeliest = judge.outputs(model, images).argmax(-1)
    np.testing.assert_allclose(nfk.grad_cam(model, images), nfk.grad_cam(model, images, likeliest), atol=1e-5)


def test_the_default_layer(images):
    """At 32 x 32 the last layers of the small network have one position; of the others shortcuts lead past most."""
    model = nfk.create_model("nfnet_tiny", weights=None, classes=4, input_shape=(32, 32, 3))
    x = images[:, 8:40, 8:40]
    assert features(model, "stage4_block1_conv1_preact", x).shape[1:3] == (2, 2)
    by_name = nfk.grad_cam(model, x, 1, layer="stage4_block1_preact")
    np.testing.assert_array_equal(nfk.grad_cam(model, x, 1), by_name)
    assert by_name.std() > 0.1


@pytest.mark.parametrize(
    "kind",
    [*(name if name == "nf_regnet_b0" else pytest.param(name, marks=pytest.mark.slow) for name in kinds.kinds())],
)
def test_every_family(kind):
    model = kinds.make(kind, classes=3)
    last = model.layers[-1].kernel
    last.assign(np.random.default_rng(0).standard_normal(last.shape))
    x = np.random.default_rng(0).standard_normal((2, 64, 64, 3), dtype="float32")
    got = nfk.grad_cam(model, x, 1)
    assert got.shape == (2, 64, 64) and got.min() >= 0 and got.max() == 1
    folded = nfk.grad_cam(nfk.fold_weight_standardization(model), x, 1)
    np.testing.assert_allclose(folded, got, atol=1e-3)


def test_models_inside_of_models(model, images):
    inputs = keras.Input((96, 64, 3))
    outer = keras.Model(inputs, layers.Softmax()(model(inputs)))
    np.testing.assert_allclose(nfk.grad_cam(outer, images, 2), nfk.grad_cam(model, images, 2), atol=1e-5)
    whole = nfk.grad_cam(outer, images, 2, layer=f"{model.name}/stage3_block1_add")
    np.testing.assert_allclose(whole, nfk.grad_cam(model, images, 2, layer="stage3_block1_add"), atol=1e-5)


def test_what_is_wrong_is_said(model, images):
    for wrong, words in (
        ({"class_index": 4}, "from 0 to 3"),
        ({"class_index": [0, -1, 0]}, "from 0 to 3"),
        ({"class_index": [0, 1]}, "one for each of the 3 images"),
        ({"class_index": 0.5}, "whole number"),
        ({"layer": "final_act_"}, "Nearest: final_act"),
        ({"layer": "avg_pool"}, "avg_pool"),
        ({"layer": layers.ReLU(name="strange")}, "strange"),
    ):
        with pytest.raises(ValueError, match=words):
            nfk.grad_cam(model, images, **wrong)
    with pytest.raises(ValueError, match="takes at least one image of shape"):
        nfk.grad_cam(model, images[:, :, :32])
    inputs = keras.Input((8, 8, 3))
    side = layers.Conv2D(2, 1, name="side")(inputs)
    pooled = layers.GlobalAveragePooling2D()(inputs)
    flat = keras.Model(inputs, layers.Dense(2)(pooled))
    with pytest.raises(ValueError, match="larger than 1 x 1"):
        nfk.grad_cam(flat, np.ones((1, 8, 8, 3)))
    for outputs, words in (([side, pooled], "2 outputs"), (side, r"\(images, classes\)")):
        with pytest.raises(ValueError, match=words):
            nfk.grad_cam(keras.Model(inputs, outputs), np.ones((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="one batch of images"):
        nfk.grad_cam(keras.Sequential([keras.Input((4,)), layers.Dense(2)]), np.ones((1, 4)))


def test_overlay():
    images = np.full((1, 2, 2, 3), 100.0)
    laid = nfk.overlay_heatmap(images, np.array([[[0, 1], [0.5, 0]]]), alpha=0.5)
    # Half of (128, 0, 0), the hottest colour, and half of the image; nothing where it is cold.
    assert laid.dtype == np.uint8
    np.testing.assert_array_equal(laid[0, 0], [[100, 100, 100], [113, 50, 50]])
    np.testing.assert_array_equal(laid[0, 1, 1], [100, 100, 100])
    for wrong, words in (
        ({"maps": np.ones((1, 3, 2))}, "same sizes"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"colormap": "no such"}, "no such"),
    ):
        with pytest.raises(ValueError, match=words):
            nfk.overlay_heatmap(**{"images": images, "maps": np.ones((1, 2, 2)), **wrong})


@pytest.mark.slow
def test_a_trained_network_sees_the_thing():
    """Bright or dark squares under noise, somewhere: the map of a network that tells them apart lies on the square."""
    rng = np.random.default_rng(0)

    def draw(count):
        x, y = rng.standard_normal((count, 96, 96, 3), dtype="float32"), rng.integers(0, 2, count)
        places = rng.integers(0, 3, (count, 2))
        for image, label, (row, column) in zip(x, y, places, strict=True):
            image[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] += 4.0 * label - 2.0
        return x, y, places

    model = nfk.create_model("nfnet_tiny", weights=None, classes=2, input_shape=(96, 96, 3))
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y, _ = draw(512)
    model.fit(x, y, epochs=8, batch_size=32, verbose=0)
    x, y, places = draw(64)
    assert model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] > 0.95
    maps = nfk.grad_cam(model, x, y)
    thirds = maps.reshape(64, 3, 32, 3, 32).sum((2, 4))
    shares = thirds[np.arange(64), places[:, 0], places[:, 1]] / maps.sum((1, 2))
    # A map that knew nothing would have a ninth of its heat there.
    assert np.median(shares) > 0.35


def test_channels_first(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    inputs = keras.Input((3, 32, 40))
    pooled = layers.GlobalAveragePooling2D(data_format="channels_first")(layers.Rescaling(2.0)(inputs))
    model = keras.Model(inputs, dense("softmax")(pooled))
    x = np.moveaxis(corners(), -1, 1)
    np.testing.assert_allclose(nfk.grad_cam(model, x, 1), x[:, 1] / 5, atol=1e-6)
