"""Training on one device or on many, with the same step: where the variables live and which images each device gets."""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import keras
from absl import logging

from nfnet_keras.distributed_data import feed_jax, feed_tensorflow

# Which backend each way of distributing needs.
NAMES = {
    "one": None,
    "mirrored": "tensorflow",
    "multi_worker": "tensorflow",
    "tpu": "tensorflow",
    "data_parallel": "jax",
}
_TF_CONFIG = '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type": "worker", "index": 0}}'
# Seconds that a TPU's name and its address have to answer.
_TPU_PATIENCE = 30.0


@dataclasses.dataclass(frozen=True)
class Distribution:
    """The devices of a run; `make` makes one.

    Attributes:
        name: `"one"`, `"mirrored"`, `"multi_worker"`, `"tpu"` or `"data_parallel"`.
        replicas: Number of devices in all, each of which has a copy of the model and a share of every batch.
        hosts: Number of machines that read data.
        host: Number of this process, from 0.
        strategy: The `tf.distribute.Strategy` or `keras.distribution.DataParallel`, or `None` with one device.

    Example:

    >>> from nfnet_keras import distribution
    >>> distribution.make("one").is_chief
    True
    """

    name: str = "one"
    replicas: int = 1
    hosts: int = 1
    host: int = 0
    strategy: Any = None

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes files; all of them may read."""
        return self.host == 0

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns a context in which to make, or to load, the model and its optimizer.

        With `"data_parallel"`, `fit` and `evaluate` belong into it as well, since Keras asks there for the devices;
        with the others they may.

        Example:

        >>> import nfnet_keras as nfk
        >>> devices = nfk.distribution.make("one")
        >>> with devices.scope():
        ...     model = nfk.create_model("nfnet_tiny", weights=None, classes=10)
        """
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    def check_batch_size(self, batch_size: int) -> None:
        """Checks that every replica can have the same number of images of a global batch.

        Args:
            batch_size: Images of a step, over all replicas.

        Raises:
            ValueError: If it cannot; with the nearest batch sizes that can.

        Example:

        >>> Distribution("mirrored", replicas=4).check_batch_size(64)
        """
        if batch_size > 0 and batch_size % self.replicas == 0:
            return
        below = batch_size - batch_size % self.replicas
        near = [str(size) for size in (below, below + self.replicas) if size > 0]
        raise ValueError(
            f"A batch of {batch_size} images cannot be shared evenly between {self.replicas} devices "
            f"({self.name!r}). The nearest batch size that can: {' or '.join(near)}."
        )

    def feed(self, make_dataset: Callable, batch_size: int):
        """Returns the data for `fit` or `evaluate`, such that every replica gets its share of each batch.

        No host reads another host's images. Batches of static size (`batch(..., drop_remainder=True)`) are for
        training. Where the last batch may be shorter, as in evaluation, it is filled up, and a sample weight of
        booleans says which of its rows are there: a `NormalizerFreeModel` then counts each image exactly once in the
        loss and in every metric. (With `"one"` device nothing needs to be filled up.) For `predict`, give the model
        arrays or a data set as ever.

        Args:
            make_dataset: Function of `shard` and `shards` that returns a `tf.data.Dataset`: this shard's share of the
                images, as batches of `batch_size / shards` images and labels. It is called for each shard that this
                process reads, at once.
            batch_size: Images of a step, over all replicas.

        Returns:
            What `model.fit` and `model.evaluate` take as `x`.

        Raises:
            ValueError: If the replicas cannot share a batch evenly, or the data set's batches are not of the size that
                they must have.

        Example:

        >>> import numpy as np, tensorflow as tf
        >>> images, labels = np.zeros((6, 32, 32, 3), "float32"), np.eye(6, dtype="float32")
        >>> def read(shard, shards):
        ...     return tf.data.Dataset.from_tensor_slices((images, labels)).shard(shards, shard).batch(4 // shards)
        >>> [len(labels) for images, labels in Distribution().feed(read, 4)]
        [4, 2]
        """
        self.check_batch_size(batch_size)
        if self.strategy is None:
            return make_dataset(0, 1)
        if self.name == "data_parallel":
            return feed_jax(make_dataset, batch_size, self.host, self.hosts)
        return feed_tensorflow(self.strategy, make_dataset, batch_size, self.host, self.hosts)

    def running(self) -> contextlib.AbstractContextManager:
        """Returns the context in which to train, evaluate and save: the `scope` with `"data_parallel"`, else none.

        (In the scope of several workers a variable is made by all of them together, and saving on one makes some.)

        Example:

        >>> with Distribution().running():
        ...     pass
        """
        return self.scope() if self.name == "data_parallel" else contextlib.nullcontext()

    def agreement(self) -> Callable[[bool], bool]:
        """Returns a function that all processes call together, and that tells each whether any of them said `True`.

        With one process it returns what it is given.

        Example:

        >>> Distribution().agreement()(True)
        True
        """
        if self.name != "multi_worker" or self.hosts == 1:
            return lambda flag: flag
        import tensorflow as tf

        strategy = self.strategy

        @tf.function
        def count(flag):
            return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(tf.identity, args=(flag,)), axis=None)

        return lambda flag: bool(count(tf.constant(float(flag))) > 0)

    def wait_for_all(self) -> None:
        """Waits until every process of the run has come here: the first to end would cut the others' connections.

        Example:

        >>> Distribution().wait_for_all()
        """
        self.agreement()(False)


def make(name: str | None = None, *, tpu: str | None = None) -> Distribution:
    """Finds the devices to train on.

    Args:
        name: One of
            - `"one"` (also `None`): one device, whatever Keras takes. Any backend.
            - `"mirrored"`: all GPUs of this machine, else its CPU devices. TensorFlow.
            - `"multi_worker"`: all machines that the environment variable `TF_CONFIG` lists. TensorFlow. To be called
              before anything else makes TensorFlow start, in every process of the cluster.
            - `"tpu"`: a Cloud TPU. TensorFlow.
            - `"data_parallel"`: all devices that JAX sees, through `keras.distribution.DataParallel`. JAX.
        tpu: With `"tpu"`: name or gRPC address of the TPU, or `"local"` on a machine that has one. `None` takes what
            the environment says (`TPU_NAME`).

    Returns:
        A `Distribution`.

    Raises:
        ValueError: If the name is none of these, needs another backend, or a setting is missing or wrong.
        RuntimeError: If no TPU answers, or TensorFlow has started already where it must not have.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.distribution.make().replicas
    1
    """
    name = "one" if name is None else name
    if name not in NAMES:
        raise ValueError(f"There is no distribution {name!r}. Known are: {', '.join(NAMES)}.")
    backend, needed = keras.backend.backend(), NAMES[name]
    if needed not in (None, backend):
        others = [other for other, its in NAMES.items() if its in (None, backend)]
        raise ValueError(
            f"The distribution {name!r} needs the backend {needed!r}, and Keras runs on {backend!r}. Set the "
            f"environment variable KERAS_BACKEND={needed} before the program starts, or take "
            f"{' or '.join(map(repr, others))}."
        )
    if tpu is not None and name != "tpu":
        raise ValueError(f"`tpu` is for the distribution 'tpu'. Received: name={name!r}, tpu={tpu!r}")
    return {"one": Distribution, "mirrored": _mirrored, "multi_worker": _multi_worker, "data_parallel": _jax}.get(
        name, lambda: _tpu(tpu)
    )()


def _mirrored() -> Distribution:
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        logging.warning("mirrored: this machine has one device only, %s; training is as with 'one'.", devices[0].name)
    strategy = _mirrored_strategy(tuple(device.name for device in devices))
    return Distribution("mirrored", strategy.num_replicas_in_sync, strategy=strategy)


@functools.cache
def _mirrored_strategy(devices: tuple[str, ...]):
    """One for a process: two strategies on the same devices take each other's sums for their own."""
    import tensorflow as tf

    # On the cores of one machine, sums that go round a ring take a twentieth of a step more.
    sums = None if "GPU" in devices[0] else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(list(devices), cross_device_ops=sums)


def _multi_worker() -> Distribution:
    hosts, host = _cluster()
    import tensorflow as tf

    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise RuntimeError(
            "The distribution 'multi_worker' must be made before TensorFlow has started: call "
            f"nfnet_keras.distribution.make('multi_worker') before any model, tensor or data set is made. ({error})"
        ) from error
    return Distribution("multi_worker", strategy.num_replicas_in_sync, hosts, host, strategy)


def _cluster() -> tuple[int, int]:
    """Reads TF_CONFIG: how many processes there are, and which of them this is."""
    text = os.environ.get("TF_CONFIG", "")
    hint = (
        "It lists all processes of the cluster, the same list on each, and says which of them this is, for example\n"
        f"    TF_CONFIG='{_TF_CONFIG}'\n"
        'on the first of two machines, and with "index": 1 on the second.'
    )
    if not text:
        raise ValueError(f"The distribution 'multi_worker' needs the environment variable TF_CONFIG. {hint}")
    try:
        config = json.loads(text)
        cluster, kind, index = config["cluster"], config["task"]["type"], int(config["task"]["index"])
        sizes = {job: len(cluster.get(job, ())) for job in ("chief", "worker")}
        known = index in range(sizes[kind])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"TF_CONFIG cannot be understood ({type(error).__name__}: {error}). It is {text!r}. {hint}"
        ) from error
    if not known:
        raise ValueError(f"TF_CONFIG says that this is {kind} {index}, which its cluster does not list: {text}. {hint}")
    return sum(sizes.values()), index + (sizes["chief"] if kind == "worker" else 0)


def _jax() -> Distribution:
    import jax

    # `feed` has each host read its own share.
    strategy = keras.distribution.DataParallel(auto_shard_dataset=False)
    return Distribution("data_parallel", jax.device_count(), jax.process_count(), jax.process_index(), strategy)


def _tpu(name: str | None) -> Distribution:
    import tensorflow as tf

    try:
        resolver, addresses = _within(_TPU_PATIENCE, lambda: _resolve(tf, name))
        for address in addresses:
            _reach(address)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise RuntimeError(
            f"No TPU answers{'' if name is None else f' as {name!r}'}: {reason}\n"
            "Give the name or the address (grpc://HOST:8470) of a TPU that runs, or 'local' on a TPU machine; this "
            "program must run where the TPU can be reached, with a TensorFlow built for it (tensorflow-tpu). Without a "
            "TPU, use 'mirrored' or 'one'."
        ) from error
    if strategy.extended.num_hosts > 1:
        raise RuntimeError(
            f"The TPU has {strategy.extended.num_hosts} hosts, and images are read by this process alone: take a TPU "
            "of one host, or KERAS_BACKEND=jax with 'data_parallel', where every host runs the program and reads its "
            "share."
        )
    return Distribution("tpu", strategy.num_replicas_in_sync, strategy=strategy)


def _resolve(tf, name: str | None):
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(name)
    jobs = resolver.cluster_spec().as_dict()
    return resolver, [address for job in jobs.values() for address in job]


def _reach(address: str) -> None:
    """Raises unless something listens at the address: TensorFlow would wait for it without end."""
    host, _, port = address.removeprefix("grpc://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TPU_PATIENCE / 3).close()
    except OSError as error:
        raise ConnectionError(f"nothing can be reached at {address} ({error})") from error


def _within(seconds: float, call: Callable):
    """Calls a function that may try again and again without end; gives up on it after some seconds."""
    outcome = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"there was no answer within {seconds:g} seconds")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
