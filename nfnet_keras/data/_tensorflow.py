"""TensorFlow, imported at the first use."""

import sys
from types import ModuleType


def tensorflow() -> ModuleType:
    """Import TensorFlow for the data pipeline.

    Under the JAX and PyTorch backends of Keras, TensorFlow only feeds images; left alone it
    would reserve nearly all memory of a GPU that it shares with the backend. The GPUs are
    hidden from it then.

    Returns:
        The `tensorflow` module.
    """
    import tensorflow as tf

    config = getattr(sys.modules.get("keras"), "config", None)
    if config is not None and config.backend() != "tensorflow":
        try:
            if tf.config.get_visible_devices("GPU"):
                tf.config.set_visible_devices([], "GPU")
        except RuntimeError:
            pass  # TensorFlow has started its devices already: too late, and harmless.
    return tf
