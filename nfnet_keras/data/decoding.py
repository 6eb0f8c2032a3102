"""Encoded images to pixels inside of `tf.data`: only the part that is needed, and past broken ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nfnet_keras.data._tensorflow import python_call, tensorflow
from nfnet_keras.data.augment import distorted_box
from nfnet_keras.data.broken import BrokenImages
from nfnet_keras.data.errors import DataError
from nfnet_keras.data.images import decode_bytes, reason

if TYPE_CHECKING:
    import tensorflow as tf

    from nfnet_keras.data.streams import PathStream, RecordStream

_JPEG = b"\xff\xd8\xff"


def decode_part(content: tf.Tensor, box: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Decode a box of an encoded image; of a JPEG, no more than that is decoded.

    The colours along the box's border then differ a little from those of a box cut out of the whole
    image: the decoder smooths the colour channels and does not see beyond the box.

    Args:
        content: The bytes of an image file, a scalar string.
        box: Makes int32 (top, left, height, width) of the image's height and width.

    Returns:
        A uint8 tensor of shape (height, width, 3).

    Raises:
        tf.errors.OpError: If the bytes are no whole image.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data.decoding import decode_part
        >>> jpeg = tf.io.encode_jpeg(tf.zeros((20, 30, 3), tf.uint8))
        >>> decode_part(jpeg, lambda height, width: tf.stack([0, 0, height // 2, width])).shape
        TensorShape([10, 30, 3])
    """
    tf = tensorflow()

    def from_jpeg() -> tf.Tensor:
        height, width = tf.unstack(tf.image.extract_jpeg_shape(content)[:2])
        return tf.image.decode_and_crop_jpeg(content, box(height, width), channels=3)

    def from_other() -> tf.Tensor:
        image = decode_bytes(content)
        top, left, height, width = tf.unstack(box(tf.shape(image)[0], tf.shape(image)[1]))
        return image[top : top + height, left : left + width]

    return tf.cond(tf.strings.substr(content, 0, len(_JPEG)) == _JPEG, from_jpeg, from_other)


def decode_crop(content: tf.Tensor, key: tf.Tensor, min_area: float, image_size: int) -> tf.Tensor:
    """Decode a random box of an encoded image, as Brock et al. (2021) do; see `augment.distorted_box`.

    Args:
        content: The bytes of an image file, a scalar string.
        key: An int64 key of shape (2,).
        min_area: Smallest share of the image's area; 1.0 gives the whole image.
        image_size: Side of what the box is resized to.

    Returns:
        A uint8 tensor of shape (height, width, 3).

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import decoding, randomness
        >>> jpeg = tf.io.encode_jpeg(tf.zeros((20, 30, 3), tf.uint8))
        >>> decoding.decode_crop(jpeg, randomness.key(0, randomness.CROP, 0), 1.0, 16).shape
        TensorShape([20, 30, 3])
    """
    if min_area >= 1.0:
        return decode_bytes(content)
    return decode_part(content, lambda height, width: distorted_box(key, height, width, min_area, image_size))


def decoded_batches(
    batches: tf.data.Dataset,
    stream: PathStream | RecordStream,
    picture: Callable[..., tf.Tensor],
    image_size: int,
    classes: int,
    ledger: BrokenImages | None,
) -> tf.data.Dataset:
    """Decode batches of encoded images; a broken one is replaced by the next good one of its batch.

    Each batch is a data set of its own, from which `ignore_errors` drops what does not decode. So the
    good images pay nothing for the bad ones, and only a batch that came out short goes through Python,
    where the missing ones are named.

    Args:
        batches: Of (epoch, step, tokens): two scalars, and what `stream` finds B images by.
        stream: Where the images are.
        picture: Makes the image of shape (image_size, image_size, 3), float32, of (content, epoch,
            step, number in the batch).
        image_size: Side of the images in pixels.
        classes: Number of classes.
        ledger: Where broken images are written down. `None`: in one of its own, which ends the data
            set with an error once there are too many.

    Returns:
        A data set of (images, class numbers, epoch, step).
    """
    tf = tensorflow()
    repair = Repair(stream, classes, ledger)
    nothing = tf.zeros([0, image_size, image_size, 3]), tf.zeros([0], tf.int64), tf.zeros([0], tf.int64)

    def one(epoch: tf.Tensor, step: tf.Tensor, tokens: Any) -> tf.data.Dataset:
        flat = tf.nest.flatten(tokens)
        count = tf.shape(flat[0], tf.int64)[0]

        def load(number: tf.Tensor, token: Any) -> tuple:
            content, label = stream.load(token)
            image = tf.ensure_shape(picture(content, epoch, step, number), (image_size, image_size, 3))
            return image, label, number

        def whole(images: tf.Tensor, labels: tf.Tensor, numbers: tf.Tensor) -> tuple:
            def mend() -> tuple:
                rows = python_call(repair.rows, [numbers, labels, *flat], tf.int64, (None,))
                return tf.gather(images, rows), tf.gather(labels, rows)

            good = tf.reduce_all((labels >= 0) & (labels < classes)) & (tf.size(numbers, tf.int64) == count)
            images, labels = tf.cond(good, lambda: (images, labels), mend)
            images = tf.ensure_shape(images, (None, image_size, image_size, 3))
            return images, tf.ensure_shape(labels, (None,)), epoch, step

        samples = tf.data.Dataset.from_tensor_slices((tf.range(count), tokens))
        samples = samples.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        # Without a good image there would be no batch at all: an empty one takes its place.
        found = samples.ignore_errors().batch(count).concatenate(tf.data.Dataset.from_tensors(nothing))
        return found.take(1).map(whole)

    # Two at a time: while the last images of one batch are decoded, the next has begun.
    return batches.interleave(one, cycle_length=2, block_length=1, num_parallel_calls=2, deterministic=True)


class Repair:
    """What is done in Python about a batch that is not whole.

    Args:
        stream: Where the images are.
        classes: Number of classes.
        ledger: Where broken images are written down. `None`: in one of its own, which ends the data set with
            an error once there are too many.
    """

    def __init__(self, stream: PathStream | RecordStream, classes: int, ledger: BrokenImages | None):
        self.stream, self.classes = stream, classes
        self.own = ledger is None
        self.ledger = BrokenImages(len(stream)) if ledger is None else ledger

    def rows(self, numbers: np.ndarray, labels: np.ndarray, *tokens: np.ndarray) -> np.ndarray:
        """Choose a good image for each place of a batch.

        Args:
            numbers: The places of the good images, ascending.
            labels: Their class numbers.
            tokens: What the stream finds all images of the batch by.

        Returns:
            For each place, which of the good images is to stand there.
        """
        count = len(tokens[0])
        for label, number in zip(labels, numbers, strict=True):
            if not 0 <= label < self.classes:
                name = self.stream.name(*(column[number] for column in tokens))
                raise self.ledger.fail(
                    DataError(
                        f"label {label} of {name} is out of range (counted from the first class); labels must be in "
                        f"0..{self.classes - 1}: give the number of classes, or mend the file"
                    )
                )
        reasons = []
        for number in np.setdiff1d(np.arange(count), numbers):
            token = [column[number] for column in tokens]
            name, why = self.stream.name(*token), self._why(token)
            self.ledger.add(name, why)
            reasons.append(f"{name} ({why})")
        if not len(numbers):
            shown = ", ".join(reasons[:3]) + (", ..." if count > 3 else "")
            raise self.ledger.fail(
                DataError(f"none of the {count} images of a batch can be decoded: {shown}; repair or remove them")
            )
        if self.own:
            self.ledger.check()
        return np.searchsorted(numbers, np.arange(count)) % len(numbers)

    def samples(
        self,
        picture: Callable[..., tf.Tensor],
        made: np.ndarray,
        labels: np.ndarray,
        places: np.ndarray,
        epoch: int,
        step: int,
        *tokens: np.ndarray,
    ) -> np.ndarray:
        """Choose a good sample for each place of a batch whose images are made of one or two samples.

        Args:
            picture: Makes a sample of (content, epoch, step, number in the batch).
            made: The numbers of the images that were made.
            labels: The class numbers of their samples, one or two an image.
            places: The places of the samples of all images.
            epoch: The epoch.
            step: Its step.
            tokens: What the stream finds all samples of the batch by.

        Returns:
            For each place, the place of the sample that is to stand there.
        """
        tf = tensorflow()
        known = dict(zip(places[made].ravel().tolist(), labels.ravel().tolist(), strict=True))
        for place in sorted(set(range(len(tokens[0]))) - set(known)):
            try:
                with tf.device("CPU:0"):
                    content, label = self.stream.load(self.stream.token(*(column[place] for column in tokens)))
                    picture(content, *(tf.constant(value, tf.int64) for value in (epoch, step, place)))
            except (tf.errors.OpError, OSError, ValueError):
                continue
            known[place] = int(label)
        numbers = np.array(sorted(known), np.int64)
        rows = self.rows(numbers, np.array([known[number] for number in numbers], np.int64), *tokens)
        return numbers[rows]

    def _why(self, token: list) -> str:
        tf = tensorflow()
        try:
            with tf.device("CPU:0"):
                decode_bytes(self.stream.load(self.stream.token(*token))[0])
        except (tf.errors.OpError, OSError, ValueError) as error:
            return reason(error) or type(error).__name__
        return "it could be read the second time"


def on_host(values: object) -> tf.Tensor:
    """Make a tensor in main memory: tf.data would copy it back from a GPU at every step.

    Example:
        >>> from nfnet_keras.data.decoding import on_host
        >>> on_host([1, 2]).shape
        TensorShape([2])
    """
    tf = tensorflow()
    with tf.device("CPU:0"):
        return tf.convert_to_tensor(values)


def encoded_names(paths: tuple[str, ...]) -> tf.Tensor:
    """Make a string tensor of paths, those that are no Unicode too.

    Example:
        >>> from nfnet_keras.data.decoding import encoded_names
        >>> encoded_names(("a.png",)).numpy().tolist()
        [b'a.png']
    """
    return on_host([os.fsencode(path) for path in paths])
