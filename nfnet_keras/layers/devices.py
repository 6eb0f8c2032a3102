"""What the backend computes on, as far as layers care."""

import os

import keras


def runs_on_cpu() -> bool:
    """True where a grouped convolution as one op is slow to train and channels first is missing."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return not (keras.distribution.list_devices("gpu") or keras.distribution.list_devices("tpu"))
    if backend == "jax":
        return all(name.startswith("cpu") for name in keras.distribution.list_devices())
    return False


def trains_as_graph_on_cpu(tensor) -> bool:
    """True where `tensorflow_fusion` pays: in a TensorFlow graph on a CPU, on a tensor whose size is known."""
    if keras.backend.backend() != "tensorflow" or isinstance(tensor, keras.KerasTensor) or not runs_on_cpu():
        return False
    from nfnet_keras.tensorflow_fusion import compiles

    return compiles(tensor)


def usable_cores() -> int:
    """Returns how many cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
