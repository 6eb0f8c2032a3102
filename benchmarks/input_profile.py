"""Where the time of the training pipeline goes.

    python -m benchmarks.input --profile

Two views, both of one thread's processor time. The pipeline is cut off after each of its stages, and what a stage adds
is printed; and each operation of RandAugment is called by itself.
"""

import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

from benchmarks.input import make_files
from benchmarks.input_sides import CLASSES, LEAST_AREA

IMAGES, ROUNDS = 64, 3


def profile(size: int = 192, layers: int = 4, magnitude: float = 5.0, seed: int = 0) -> str:
    """Returns the tables, in milliseconds an image.

    Args:
        size: Side of the images in pixels.
        layers: RandAugment's operations an image.
        magnitude: Their strength.
        seed: Seed of the images and of what is drawn.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as folder:
        make_files(pathlib.Path(folder), seed, IMAGES)
        names = sorted(map(str, pathlib.Path(folder).glob("*/*.jpg")))
        lines = [f"{size} x {size}, RandAugment {layers} x {magnitude:g}", "", "| stage | ms an image | sum |"]
        lines.append("| --- | ---: | ---: |")
        before = 0.0
        for name, batches, images in _stages(names, size, layers, magnitude, seed):
            total = _milliseconds(batches) / images
            lines.append(f"| {name} | {total - before:.3f} | {total:.3f} |")
            before = total
        lines += ["", "| operation of RandAugment | ms |", "| --- | ---: |"]
        lines += [f"| {name} | {value:.3f} |" for name, value in _operations(names[0], size, magnitude)]
    return "\n".join(lines)


def _stages(names: list[str], size: int, layers: int, magnitude: float, seed: int) -> Iterator[tuple]:
    """Gives the name of each stage, the data set that ends with it, and the images that it makes."""
    import numpy as np
    import tensorflow as tf

    from nfnet_keras import data
    from nfnet_keras.data import randomness
    from nfnet_keras.data.decoding import decode_crop
    from nfnet_keras.data.images import resize

    def key(number):
        return randomness.key(seed, randomness.CROP, tf.constant(0, tf.int64), number)

    files = tf.data.Dataset.from_tensor_slices(names).enumerate()
    files = files.map(lambda number, name: (number, tf.io.read_file(name)))
    crops = files.map(lambda number, content: decode_crop(content, key(number), LEAST_AREA, size))
    yield "read the file", files, IMAGES
    yield "choose a box, decode it", crops, IMAGES
    yield "resize, bicubic", crops.map(lambda crop: resize(crop, size, False)), IMAGES

    split = data.Split(np.arange(len(names), dtype=np.int32), paths=tuple(names))

    def whole(**more):
        augment = data.Augment(min_area=LEAST_AREA, **more)
        return data.training_batches(split, CLASSES, size, IMAGES // 2, augment, seed, epochs=1, antialias=False)

    distort = {"randaugment_layers": layers, "randaugment_magnitude": magnitude}
    yield "no flip: order, normalise, batch, labels", whole(flip=False), IMAGES
    yield "flip", whole(), IMAGES
    yield f"RandAugment, {layers} operations", whole(**distort), IMAGES
    twice = {"mixup": 0.2, "cutmix": 1.0, "mix_from_twice": True}
    # Two steps an epoch, of half of the images each, made of twice as many.
    yield "the paper's: mixed from twice the images", whole(**distort, **twice), IMAGES


def _milliseconds(batches) -> float:
    """Returns the least processor time of one way through, less what starting takes."""
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    batches = batches.with_options(options)
    often = [_least(lambda count=count: sum(1 for _ in batches.repeat(count))) for count in (1, 4)]
    return (often[1] - often[0]) / 3


def _operations(name: str, size: int, magnitude: float) -> Iterator[tuple[str, float]]:
    import tensorflow as tf

    from nfnet_keras.data.image_operations import OPERATIONS, operate

    image = tf.io.decode_jpeg(tf.io.read_file(name), channels=3)
    image = tf.cast(tf.image.resize(image, (size, size)), tf.uint8)
    centre = tf.constant([size // 2, size // 3])
    # A call costs something by itself, which a graph of many operations does not pay.
    identity = tf.function(tf.identity)
    nothing = _least(lambda: _fifty(identity, image))
    for operation in OPERATIONS:
        call = tf.function(lambda image, operation=operation: operate(operation, image, magnitude, 1.0, centre))
        yield operation, max(0.0, (_least(lambda call=call: _fifty(call, image)) - nothing) / 50)


def _fifty(call: Callable, image) -> None:
    for _ in range(50):
        call(image)


def _least(work: Callable[[], object]) -> float:
    """Returns the least milliseconds of the processor that some calls took, after one that is not counted."""
    work()
    found = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return 1000 * min(found)
