"""A run that costs little: a network of a few layers, and a part of the digits.

For tests of what a run does whatever it trains: most of a short run's time would be building and tracing a network.
"""

from collections.abc import Callable

import keras

import nfnet_keras as nfk
from nfnet_keras import data
from nfnet_keras.training import building


def create_model(name: str, *, weights, input_shape: tuple, classes: int, **options) -> keras.Model:
    """In the place of `building.create_model`: layers named as those of the zoo, in every stage one."""
    if weights is not None:
        return nfk.create_model(name, weights=weights, input_shape=input_shape, classes=classes, **options)
    inputs = keras.Input(input_shape)
    x = keras.layers.Activation("silu")(nfk.layers.WSConv2D(16, 3, strides=4, name="stem_conv0")(inputs))
    for stage in range(1, 5):
        x = nfk.layers.WSConv2D(16, 1, name=f"stage{stage}_block1_conv0")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(options.get("drop_rate", 0.2))(x)
    outputs = keras.layers.Dense(classes, activation="softmax", name="predictions")(x)
    return nfk.NormalizerFreeModel(inputs, outputs)


def digits(part: int) -> data.ImageSet:
    """Every `part`-th of the digits."""
    full = data.digits()
    splits = (data.Split(each.labels[::part], images=each.images[::part]) for each in (full.train, full.test))
    return data.ImageSet("digits", full.class_names, *splits)


def use(images: data.ImageSet, network: Callable = create_model, set_attribute: Callable = setattr) -> None:
    """Makes runs train a network on images; with a monkeypatch's `setattr` until that is undone."""
    set_attribute(data, "open_images", lambda *_: images)
    set_attribute(building, "create_model", network)
