"""Other classes for a model that is there already."""

import keras

from nfnet_keras.applications.common import check_classes, classifier
from nfnet_keras.model import NormalizerFreeModel

_OF_CLASSES = ("class_names", "class_ids")


def replace_head(
    model: keras.Model, classes: int, classifier_activation="softmax", *, name: str | None = None
) -> NormalizerFreeModel:
    """Puts a new classifier in the place of a model's last layer.

    The other layers are shared with the given model, weights and all: training the one changes the other. The new model
    is not compiled.

    Source: what `reset_classifier` is in timm.

    Args:
        model: A functional model whose one output comes from a Dense layer: any classifier of this package, and others.
        classes: Number of classes of the new classifier.
        classifier_activation: Its activation; `None` gives logits. Defaults to `"softmax"`.
        name: Name of the new model. Defaults to the given model's.

    Returns:
        A `NormalizerFreeModel` that ends in a layer named `predictions`. Its metadata is the given model's without the
        names of the classes.

    Raises:
        ValueError: If `classes` is not positive, or the model does not end in a Dense layer.

    Example:

    >>> import nfnet_keras as nfk
    >>> digits = nfk.create_model("nfnet_tiny", weights=None, classes=10)
    >>> letters = nfk.replace_head(digits, 26)
    >>> letters.output_shape
    (None, 26)
    """
    check_classes(classes)
    outputs = getattr(model, "outputs", None)
    last = outputs[0]._keras_history.operation if outputs and len(outputs) == 1 else None
    if not isinstance(last, keras.layers.Dense):
        raise ValueError(
            "`model` must be a functional model with one output, that of a Dense layer. "
            f"Received: {model!r} that ends in {last!r}"
        )
    features = last._inbound_nodes[outputs[0]._keras_history.node_index].input_tensors[0]
    head = classifier(classes, classifier_activation)
    result = NormalizerFreeModel(_inputs(model), head(features), name=name or model.name)
    result.remat = getattr(model, "remat", False)
    metadata = getattr(model, "metadata", {})
    result.metadata = {key: value for key, value in metadata.items() if key not in _OF_CLASSES}
    return result


def _inputs(model: keras.Model):
    """Returns a model's inputs as it takes them: one, a list or a dictionary."""
    try:
        return model.input
    except AttributeError:
        # A Sequential that was never called.
        return model.inputs[0] if len(model.inputs) == 1 else model.inputs
