"""The axes of the units of layers whose weights' shapes do not tell."""

import keras
import pytest

from nfnet_keras.layers import WSConv2D
from nfnet_keras.optimizers.units import unit_axes

L = keras.layers


def named_axes(layer) -> dict:
    axes = unit_axes(layer)
    return {v.path.split("/", 1)[-1]: axes[id(v)] for v in layer.trainable_variables if id(v) in axes}


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4), {"kernel": (0, 1)}),
        (lambda: L.DepthwiseConv1D(3), (8, 4), {"kernel": (0,)}),
        (lambda: L.SeparableConv2D(5, 3), (8, 8, 4), {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)}),
        (lambda: L.SeparableConv1D(5, 3), (8, 4), {"depthwise_kernel": (0,), "pointwise_kernel": (0, 1)}),
        (lambda: L.Conv1D(5, 3), (8, 4), {"kernel": (0, 1)}),
        (lambda: L.Conv1DTranspose(5, 3), (8, 4), {"kernel": (0, 2)}),
        (lambda: L.Conv2DTranspose(5, 3), (8, 8, 4), {"kernel": (0, 1, 3)}),
        (lambda: L.Conv3DTranspose(5, 3), (4, 4, 4, 2), {"kernel": (0, 1, 2, 4)}),
        (lambda: L.EinsumDense("abc,cde->abde", (None, 2, 3)), (4, 5), {"kernel": (0,)}),
        (lambda: L.EinsumDense("...x,xy->...y", 3), (4, 5), {"kernel": (0,)}),
        (lambda: L.Conv2D(5, 3), (8, 8, 4), {}),
        (lambda: WSConv2D(5, 3), (8, 8, 4), {}),
        (lambda: L.Conv3D(5, 3), (4, 4, 4, 2), {}),
        (lambda: L.Dense(5), (4,), {}),
        (lambda: L.LayerNormalization(), (4,), {}),
    ],
)
def test_layers(layer, shape, expected):
    layer = layer()
    layer.build((None, *shape))
    assert named_axes(layer) == expected


@pytest.mark.parametrize(
    "layer", [lambda: L.Conv2DTranspose(5, 3), lambda: L.DepthwiseConv2D(3), lambda: L.Conv1D(3, 2)]
)
def test_unbuilt_layers_have_none(layer):
    assert unit_axes(layer()) == {}


def test_multi_head_attention():
    layer = L.MultiHeadAttention(num_heads=2, key_dim=3)
    layer.build((None, 4, 5), (None, 4, 5))
    axes = unit_axes(layer)
    kernels = {v.path: (v, axes[id(v)]) for v in layer.trainable_variables if v.path.endswith("kernel")}
    assert len(kernels) == 4
    for path, (kernel, summed) in kernels.items():
        if "output" in path:
            # (heads, width of a head, outputs): one unit an output.
            assert (tuple(kernel.shape), summed) == ((2, 3, 5), (0, 1))
        else:
            # (inputs, heads, width of a head): one unit a channel of a head.
            assert (tuple(kernel.shape), summed) == ((5, 2, 3), (0,))


def test_nested_models_and_layers_in_layers():
    inner = keras.Sequential([keras.Input((8, 8, 4)), L.DepthwiseConv2D(3, name="depthwise")])
    inputs = keras.Input((8, 8, 4))
    x = L.TimeDistributed(L.Conv1D(3, 3, name="conv1d"))(inner(inputs))
    outer = keras.Model(inputs, L.Conv2DTranspose(2, 3, name="transposed")(x))
    outermost = keras.Sequential([keras.Input((8, 8, 4)), outer])
    axes = unit_axes(outermost)
    found = [axes.get(id(v)) for v in outermost.trainable_variables if v.path.endswith("kernel")]
    assert sorted(found) == [(0, 1), (0, 1), (0, 1, 3)]


def test_lora_kernels_do_not_break_it():
    layer = L.EinsumDense("abc,cd->abd", (None, 4))
    layer.build((None, 4, 5))
    layer.enable_lora(2)
    assert unit_axes(layer)[id(layer._kernel)] == (0,)
