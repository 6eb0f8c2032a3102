"""Where the devices are found, how they are fed, and what is said when something is missing."""

import json
import time
import types

import keras
import numpy as np
import pytest

import nfnet_keras as nfk
from nfnet_keras import distribution
from nfnet_keras.distribution import Distribution

tf = pytest.importorskip("tensorflow")
TENSORFLOW = keras.backend.backend() == "tensorflow"
only_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="tf.distribute needs the TensorFlow backend")


def test_one_device_is_the_default():
    devices = distribution.make()
    assert (devices.name, devices.replicas, devices.hosts, devices.host, devices.is_chief) == ("one", 1, 1, 0, True)
    with devices.scope():
        model = nfk.create_model("nfnet_tiny", weights=None, classes=2)
    dataset = tf.data.Dataset.range(3)
    assert devices.feed(lambda shard, shards: dataset.shard(shards, shard), 2) is not None
    assert model.count_params() > 0


def test_only_the_first_host_is_chief():
    assert [Distribution("multi_worker", 2, 2, host).is_chief for host in (0, 1)] == [True, False]


@pytest.mark.parametrize(
    ("batch_size", "nearest"), [(100, "96 or 104"), (7, "8"), (1, "8"), (0, "8"), (4097, "4096 or 4104")]
)
def test_batches_that_cannot_be_shared(batch_size, nearest):
    devices = Distribution("mirrored", replicas=8)
    with pytest.raises(ValueError, match=rf"A batch of {batch_size} images .* 8 devices .*can: {nearest}\."):
        devices.check_batch_size(batch_size)
    with pytest.raises(ValueError, match="cannot be shared evenly"):
        devices.feed(None, batch_size)
    devices.check_batch_size(16)


def test_unknown_names_and_backends():
    with pytest.raises(ValueError, match=r"no distribution 'two'\. Known are: one, mirrored, multi_worker, tpu"):
        distribution.make("two")
    wrong, needed = ("data_parallel", "jax") if TENSORFLOW else ("mirrored", "tensorflow")
    with pytest.raises(ValueError, match=f"needs the backend '{needed}'.*KERAS_BACKEND={needed} .*'one'"):
        distribution.make(wrong)
    with pytest.raises(ValueError, match="`tpu` is for the distribution 'tpu'"):
        distribution.make("one", tpu="local")


@only_tensorflow
def test_a_machine_with_one_device(monkeypatch):
    said = []
    monkeypatch.setattr(distribution.logging, "warning", lambda text, *args: said.append(text % args))
    devices = distribution.make("mirrored")
    assert devices.replicas == 1
    assert "one device only" in said[0] and "CPU:0" in said[0]


@only_tensorflow
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "needs the environment variable TF_CONFIG"),
        ("{", r"cannot be understood \(JSONDecodeError"),
        ('{"cluster": {"worker": ["a:1"]}}', r"cannot be understood \(KeyError: 'task'"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
            r"cannot be understood \(KeyError: 'ps'",
        ),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "is worker 1, which its cluster"),
    ],
)
def test_tf_config_is_explained(monkeypatch, config, message):
    if config is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=message) as caught:
        distribution.make("multi_worker")
    assert 'TF_CONFIG=\'{"cluster": {"worker": [' in str(caught.value)


@pytest.mark.parametrize(
    ("cluster", "task", "expected"),
    [
        ({"worker": ["a:1", "b:1"]}, ("worker", 1), (2, 1)),
        ({"chief": ["c:1"], "worker": ["a:1", "b:1"]}, ("chief", 0), (3, 0)),
        ({"chief": ["c:1"], "worker": ["a:1", "b:1"]}, ("worker", 1), (3, 2)),
    ],
)
def test_hosts_are_numbered(monkeypatch, cluster, task, expected):
    config = {"cluster": cluster, "task": {"type": task[0], "index": task[1]}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert distribution._cluster() == expected


@only_tensorflow
def test_a_cluster_is_made_first_of_all(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["127.0.0.1:1"]}, "task": {"type": "worker", "index": 0}}')
    tf.zeros(()).numpy()
    with pytest.raises(RuntimeError, match=r"before TensorFlow has started: call nfnet_keras\.distribution\.make"):
        distribution.make("multi_worker")


class FakeTPU:
    """Stands for the parts of TensorFlow that reach a TPU, and notes what is called in which order."""

    def __init__(self, monkeypatch, addresses=(), hosts=1):
        self.calls = []
        fake, resolver = self, types.SimpleNamespace()
        spec = types.SimpleNamespace(as_dict=lambda: {"worker": list(addresses)})
        resolver.cluster_spec = lambda: spec

        class Strategy:
            num_replicas_in_sync = 8
            extended = types.SimpleNamespace(num_hosts=hosts)

            def __init__(self, given):
                fake.calls.append(("strategy", given is resolver))

        def resolve(name):
            fake.calls.append(("resolver", name))
            return resolver

        def note(what):
            return lambda given: fake.calls.append((what, given is resolver))

        monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolve)
        monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", note("connect"))
        monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", note("initialize"))
        monkeypatch.setattr(tf.distribute, "TPUStrategy", Strategy)


@only_tensorflow
@pytest.mark.parametrize("name", [None, "local", "my-tpu"])
def test_a_tpu_is_connected_step_by_step(monkeypatch, name):
    fake = FakeTPU(monkeypatch)
    devices = distribution.make("tpu", tpu=name)
    assert fake.calls == [("resolver", name), ("connect", True), ("initialize", True), ("strategy", True)]
    assert (devices.name, devices.replicas, devices.hosts, devices.is_chief) == ("tpu", 8, 1, True)


@only_tensorflow
def test_a_tpu_of_several_hosts_is_refused(monkeypatch):
    FakeTPU(monkeypatch, hosts=4)
    with pytest.raises(RuntimeError, match="The TPU has 4 hosts"):
        distribution.make("tpu")


@only_tensorflow
def test_a_tpu_that_cannot_be_reached_is_not_waited_for(monkeypatch):
    fake = FakeTPU(monkeypatch, ["127.0.0.1:9"])
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"No TPU answers as 'my-tpu': nothing can be reached at 127\.0\.0\.1:9"):
        distribution.make("tpu", tpu="my-tpu")
    assert time.monotonic() - begin < 15
    assert fake.calls == [("resolver", "my-tpu")]


@only_tensorflow
def test_a_tpu_name_that_nobody_answers_for(monkeypatch):
    monkeypatch.setattr(distribution, "_TPU_PATIENCE", 0.2)
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", lambda name: time.sleep(60))
    with pytest.raises(RuntimeError, match=r"'my-tpu': there was no answer within 0\.2 seconds"):
        distribution.make("tpu", tpu="my-tpu")


@only_tensorflow
@pytest.mark.parametrize("address", ["grpc://127.0.0.1:9", "local"])
def test_no_tpu_here(monkeypatch, address):
    """TensorFlow's own resolver: an address that refuses, and this machine, which has no TPU."""
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)No TPU answers as .*'mirrored' or 'one'\."):
        distribution.make("tpu", tpu=address)
    assert time.monotonic() - begin < 30


def shard_of(count, weights=False):
    images = np.arange(count, dtype="float32")[:, None]

    def make_dataset(shard, shards):
        parts = (images, images[:, 0]) + ((images[:, 0],) if weights else ())
        return tf.data.Dataset.from_tensor_slices(parts).shard(shards, shard).batch(8 // shards)

    return make_dataset


def test_short_batches_are_filled_up_and_marked():
    from nfnet_keras.distributed_data import feed_jax

    batches = list(feed_jax(shard_of(11), 8, 0, 1))
    assert [tuple(x.shape) for x, _, _ in batches] == [(8, 1), (8, 1)]
    assert [int(np.sum(present)) for _, _, present in batches] == [8, 3]
    present = np.concatenate([np.asarray(x)[np.asarray(mask)] for x, _, mask in batches])
    np.testing.assert_array_equal(present[:, 0], np.arange(11))


def test_training_data_stay_as_they_are():
    from nfnet_keras.distributed_data import feed_jax

    dataset = tf.data.Dataset.from_tensor_slices((np.zeros((16, 2)), np.zeros(16))).batch(8, drop_remainder=True)
    assert feed_jax(lambda shard, shards: dataset, 8, 0, 1) is dataset


def test_data_that_cannot_be_fed():
    from nfnet_keras.distributed_data import feed_jax

    whole = tf.data.Dataset.from_tensor_slices((np.zeros((16, 2)), np.zeros(16))).batch(4, drop_remainder=True)
    with pytest.raises(ValueError, match=r"must return batches of 8 images, .* returned batches of 4;"):
        feed_jax(lambda shard, shards: whole, 8, 0, 1)
    with pytest.raises(ValueError, match="without sample weights"):
        feed_jax(shard_of(11, weights=True), 8, 0, 1)


@only_tensorflow
def test_each_replica_gets_its_share():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    devices = Distribution("mirrored", strategy.num_replicas_in_sync, strategy=strategy)
    batches = devices.feed(shard_of(11), 8)
    assert int(batches.cardinality) == 2
    assert [int(tf.reduce_sum(tf.cast(present, tf.int32))) for _, _, present in batches] == [8, 3]


@only_tensorflow
def test_hosts_with_unequal_data():
    from nfnet_keras.distributed_data import _even, _lengthen

    dataset = _lengthen(_even(shard_of(11)(1, 2), 4), 2, 3, True, 1)
    assert [int(np.sum(present)) for _, _, present in dataset] == [4, 1, 0]
    with pytest.raises(ValueError, match="Host 1 has 2 batches and another has 3"):
        _lengthen(shard_of(8)(1, 2), 2, 3, False, 1)


def masked_model():
    inputs = keras.Input((4,))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(3, name="predictions")(inputs))
    metrics = ["accuracy", keras.metrics.AUC(from_logits=True, name="auc")]
    weighted = [keras.metrics.CategoricalAccuracy(name="weighted")]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=metrics, weighted_metrics=weighted)
    return model


def test_rows_that_are_not_there_count_nowhere():
    """A sample weight of booleans leaves rows out of the loss and of every metric, weighted or not."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((11, 4)).astype("float32"), np.eye(3, dtype="float32")[rng.integers(0, 3, 11)]
    model = masked_model()
    plain = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    filled = [np.concatenate([a, 100 * np.ones_like(a[:5])]) for a in (x, y)]
    masked = model.evaluate(*filled, 4, sample_weight=np.arange(16) < 11, verbose=0, return_dict=True)
    assert masked == pytest.approx(plain, rel=1e-6)
    # Weights that are numbers stay Keras's: the rows count in the mean of the loss.
    weighted = model.evaluate(
        *filled, 4, sample_weight=(np.arange(16) < 11).astype("float32"), verbose=0, return_dict=True
    )
    assert weighted["loss"] == pytest.approx(plain["loss"] * 11 / 16, rel=1e-5)
