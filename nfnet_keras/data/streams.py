"""The order in which encoded images are read: files by their paths, and records."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nfnet_keras.data import randomness
from nfnet_keras.data._tensorflow import python_call, tensorflow
from nfnet_keras.data.broken import BrokenImages
from nfnet_keras.data.cache import Folder, Memory
from nfnet_keras.data.decoding import encoded_names, on_host
from nfnet_keras.data.errors import DataError
from nfnet_keras.data.images import reason
from nfnet_keras.data.records import Records
from nfnet_keras.data.splits import Split

if TYPE_CHECKING:
    import tensorflow as tf

_FILES_AT_ONCE, _RECORDS_OF_EACH = 16, 4
_READ_BUFFER = 4 << 20
_SHUFFLED_RECORDS, _SHUFFLED_BYTES = 16_384, 2 << 30
# The seed of a shuffle is folded with TensorFlow's global one; inside of a data set's function it is this.
_GRAPH_SEED = 1


@dataclass(frozen=True)
class Plan:
    """Which images the steps of a run take.

    Args:
        size: Images in the split.
        batch: Images a step on all hosts together.
        steps: Steps an epoch.
        seed: The seed of the run.
        passes: How often an epoch goes through the split, each time in a new order; a step takes as many
            times `batch` images. Default 1.
        first_epoch: The epoch to start with. Default 0.
        first_step: Its step to start with. Default 0.
        epochs: How many epochs there are. Default `None`, endless.
        shard: The number of this host. Default 0.
        shards: The number of hosts. Default 1.

    Example:
        >>> from nfnet_keras.data.streams import Plan
        >>> Plan(size=100, batch=32, steps=3, seed=0, passes=2, shards=4).own
        16
    """

    size: int
    batch: int
    steps: int
    seed: int
    passes: int = 1
    first_epoch: int = 0
    first_step: int = 0
    epochs: int | None = None
    shard: int = 0
    shards: int = 1

    @property
    def own(self) -> int:
        """Images that this host reads at a step."""
        return self.passes * self.batch // self.shards

    def each_epoch(self, make: Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]) -> tf.data.Dataset:
        """Join the data sets that `make` gives for (epoch, its first step)."""
        tf = tensorflow()
        last = tf.int64.max if self.epochs is None else self.first_epoch + self.epochs

        def one(epoch: tf.Tensor) -> tf.data.Dataset:
            return make(epoch, tf.where(epoch == self.first_epoch, tf.constant(self.first_step, tf.int64), 0))

        return tf.data.Dataset.range(self.first_epoch, last).flat_map(one)

    def position(self, step: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Place in the epoch, over all hosts, of the image with a number in this host's part of a step."""
        return step * self.passes * self.batch + self.shard * self.own + number

    def key(self, purpose: int, epoch: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Make the key of what is drawn for the whole batch of a step on this host."""
        return randomness.key(self.seed, purpose, epoch, step * self.shards + self.shard)

    def places(self) -> tf.data.Dataset:
        """Give (epoch, step, rows of the split) for every step, in order; the rows are this host's."""
        tf = tensorflow()

        def one(epoch: tf.Tensor, begin: tf.Tensor) -> tf.data.Dataset:
            orders = []
            for number in range(self.passes):
                key = randomness.key(self.seed, randomness.ORDER, epoch * self.passes + number)
                orders.append(randomness.permutation(key, self.size)[: self.steps * self.batch])
            rows = tf.reshape(tf.concat(orders, axis=0), [self.steps, self.passes * self.batch])
            rows = rows[begin:, self.shard * self.own : (self.shard + 1) * self.own]
            steps = tf.range(begin, self.steps, dtype=tf.int64)
            return tf.data.Dataset.from_tensor_slices((tf.fill(tf.shape(steps), epoch), steps, rows))

        return self.each_epoch(one)


class PathStream:
    """Images in files of their own; a token is a row of the split.

    Args:
        split: A split of paths.
        cache: What keeps the files' contents, or `None`.
    """

    def __init__(self, split: Split, cache: Memory | Folder | None = None):
        self._split, self._cache = split, cache
        self._paths, self._labels = encoded_names(split.paths), on_host(split.labels.astype("int64"))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._split)

    def shuffled(self, plan: Plan) -> tf.data.Dataset:
        """Give (epoch, step, tokens) for every step."""
        return plan.places().map(lambda epoch, step, rows: (epoch, step, (rows,)))

    def in_order(self, shard: int, shards: int) -> tf.data.Dataset:
        """Give the token of each image of this host once."""
        return tensorflow().data.Dataset.range(shard, len(self), shards).map(lambda row: (row,))

    def load(self, token: tuple) -> tuple[tf.Tensor, tf.Tensor]:
        """Read the content of an image and its class number."""
        path = self._paths[token[0]]
        read = tensorflow().io.read_file if self._cache is None else self._cache.content
        return read(path), self._labels[token[0]]

    def token(self, row: int) -> tuple:
        """Make a token again of what NumPy has of it."""
        return (int(row),)

    def name(self, row: int) -> str:
        """Name an image for a message."""
        return repr(self._split.paths[int(row)])


class RecordStream:
    """Images in TFRecord files; a token is the record, its file's number and its number in the file.

    The order of an epoch: the files are permuted, sixteen are read at a time, a few records of each in
    turn, and these go through a shuffle buffer. All three follow from (seed, epoch).

    Args:
        records: The split.
        cache: What keeps the files, or `None`.
        ledger: Told of files that cannot be read, or `None`.
    """

    def __init__(self, records: Records, cache: Memory | Folder | None = None, ledger: BrokenImages | None = None):
        self._records, self._cache, self._ledger = records, cache, ledger
        shards = records.shards
        self._paths = encoded_names(tuple(shard.path for shard in shards))
        self._skips = on_host([shard.skip for shard in shards])
        self._counts = on_host([shard.count for shard in shards])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._records)

    def shuffled(self, plan: Plan) -> tf.data.Dataset:
        """Give (epoch, step, tokens) for every step.

        Hosts divide the files where each then has enough records for all steps; otherwise every host
        reads all files, and takes each n-th record.
        """
        tf = tensorflow()
        files, by_files = self._files(plan)
        largest = int(_SHUFFLED_BYTES / max(self._records.mean_size, 1.0))
        buffer = max(1, min(_SHUFFLED_RECORDS, largest, len(self)))

        def one_pass(number: tf.Tensor) -> tf.data.Dataset:
            key = randomness.key(plan.seed, randomness.ORDER, number)
            order = tf.gather(files, randomness.permutation(key, len(files)))
            records = self._interleaved(order)
            if not by_files:
                records = records.shard(plan.shards, plan.shard)
            draw = tf.random.stateless_uniform([], randomness.fold(key, 1 + plan.shard), None, None, tf.int64)
            records = records.shuffle(buffer, seed=draw, reshuffle_each_iteration=False)
            return records.take(plan.steps * plan.batch // plan.shards)

        def one(epoch: tf.Tensor, begin: tf.Tensor) -> tf.data.Dataset:
            tf.random.set_seed(_GRAPH_SEED)  # of this function's graph, which is being traced, and of nothing else
            records = one_pass(epoch * plan.passes)
            for number in range(1, plan.passes):
                records = records.concatenate(one_pass(epoch * plan.passes + number))
            batches = records.batch(plan.own, drop_remainder=True).enumerate().skip(begin)
            return batches.map(lambda step, tokens: (epoch, step, tokens))

        return plan.each_epoch(one)

    def in_order(self, shard: int, shards: int) -> tf.data.Dataset:
        """Give the token of each image of this host once."""
        tf = tensorflow()
        return self._interleaved(tf.range(len(self._records.shards))).shard(shards, shard)

    def load(self, token: tuple) -> tuple[tf.Tensor, tf.Tensor]:
        """Take the content of an image and its class number out of its record."""
        return self._records.parse(token[0])

    def token(self, serialized: bytes, shard: int, index: int) -> tuple:
        """Make a token again of what NumPy has of it."""
        return serialized, int(shard), int(index)

    def name(self, serialized: bytes, shard: int, index: int) -> str:
        """Name an image for a message."""
        return self._records.name(int(shard), int(index), serialized)

    def _files(self, plan: Plan) -> tuple[tf.Tensor, bool]:
        """Choose the files that this host reads; whether they are its own."""
        tf = tensorflow()
        counts = [shard.count for shard in self._records.shards]
        needed = plan.steps * plan.batch // plan.shards
        if all(sum(counts[host :: plan.shards]) >= needed for host in range(plan.shards)):
            return tf.range(plan.shard, len(counts), plan.shards), True
        return tf.range(len(counts)), False

    def _interleaved(self, files: tf.Tensor) -> tf.data.Dataset:
        tf = tensorflow()
        return tf.data.Dataset.from_tensor_slices(files).interleave(
            self._read,
            cycle_length=_FILES_AT_ONCE,
            block_length=_RECORDS_OF_EACH,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    def _read(self, file: tf.Tensor) -> tf.data.Dataset:
        tf = tensorflow()
        path, skip, count = (tf.gather(column, file) for column in (self._paths, self._skips, self._counts))
        end = tf.cast(skip + count, tf.int64)
        opened = python_call(self._opened, [path], tf.string)
        if isinstance(self._cache, Memory):
            whole = tf.data.Dataset.from_tensor_slices(self._cache.records(opened))
        else:
            local = opened if self._cache is None else self._cache.local(opened)
            whole = tf.data.TFRecordDataset(local, buffer_size=_READ_BUFFER)
        # TensorFlow's error about a damaged file does not say which: the records end at the damage instead, and where
        # they are fewer than they should be comes one that says it.
        whole = whole.ignore_errors()
        late = tf.data.Dataset.from_tensors(path).map(lambda path: python_call(self._why, [path], tf.string))
        records = whole.concatenate(late).enumerate().take(end).skip(tf.cast(skip, tf.int64))
        return records.map(lambda index, serialized: (serialized, file, index))

    def _opened(self, path: bytes) -> bytes:
        """Check that a file can be opened: `ignore_errors` would try for ever to open one that cannot."""
        tf = tensorflow()
        try:
            with tf.io.gfile.GFile(path, "rb") as file:
                file.read(1)
        except tf.errors.OpError as problem:
            error = DataError(f"cannot read TFRecord file {os.fsdecode(path)!r} ({reason(problem)}); was it moved?")
            raise error if self._ledger is None else self._ledger.fail(error) from None
        return path

    def _why(self, path: bytes) -> bytes:
        """Raise what is wrong with a file that ended too early."""
        tf = tensorflow()
        name, read, why = os.fsdecode(path), 0, "it has fewer records than when it was counted"
        try:
            for _ in tf.compat.v1.io.tf_record_iterator(name):
                read += 1
        except tf.errors.OpError as problem:
            why = reason(problem)
        error = DataError(f"TFRecord file {name!r} is damaged after {read} records ({why}); copy or write it anew")
        raise error if self._ledger is None else self._ledger.fail(error)
