"""Which axes a unit of a layer's weights runs over, where the weight's shape cannot tell."""

import keras

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def unit_axes(model: keras.layers.Layer) -> dict[int, tuple[int, ...]]:
    """Finds the axes that adaptive gradient clipping sums over, for every weight whose shape does not tell.

    A unit is what computes one output channel. Covered are depthwise, separable, transposed and 1-D convolutions,
    `EinsumDense` and the attention layers made of it; all other weights follow the rule of `unitwise_norm`.

    Args:
        model: A built model or layer; layers inside layers are looked at too.

    Returns:
        {id of a variable: axes to sum over}.

    Example:

    >>> from nfnet_keras.optimizers.units import unit_axes
    >>> layer = keras.layers.Conv2DTranspose(4, 3)
    >>> layer.build((None, 8, 8, 2))
    >>> list(unit_axes(layer).values())
    [(0, 1, 3)]
    """
    found: dict[int, tuple[int, ...]] = {}
    for layer in model._flatten_layers(include_self=True, recursive=True):
        if layer.built:
            found.update({id(variable): axes for variable, axes in _layer_axes(layer)})
    return found


def _layer_axes(layer) -> list[tuple[keras.Variable, tuple[int, ...]]]:
    if isinstance(layer, _SEPARABLE):
        spatial = tuple(range(layer.rank))
        return [(layer.depthwise_kernel, spatial), (layer.pointwise_kernel, (*spatial, layer.rank))]
    kernel = getattr(layer, "_kernel", None)
    if kernel is None:
        kernel = vars(layer).get("kernel")
    if not isinstance(kernel, keras.Variable):
        return []
    if isinstance(layer, _DEPTHWISE):
        return [(kernel, tuple(range(layer.rank)))]
    if isinstance(layer, _TRANSPOSED):
        return [(kernel, (*range(layer.rank), layer.rank + 1))]
    if isinstance(layer, keras.layers.Conv1D):
        return [(kernel, (0, 1))]
    if isinstance(layer, keras.layers.EinsumDense):
        inputs_and_kernel, output = layer.equation.split("->")
        letters = inputs_and_kernel.split(",")[1].strip()
        return [(kernel, tuple(i for i, letter in enumerate(letters) if letter not in output))]
    return []
