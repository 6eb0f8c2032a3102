"""The input pipelines that `benchmarks.input` compares, each in a process of its own.

    python -m benchmarks.input_sides SIDE FOLDER SIZE BATCH LAYERS MAGNITUDE TWICE SEED

Builds the pipeline over a folder of JPEG files, takes a batch, and prints a line of JSON with versions. For every line
with two numbers that then comes in, it takes batches for so many seconds that are not counted, and for so many that
are, and prints the images that came out, the seconds, and the processor's seconds of this process and its workers.

Each side imports what it needs only when it is asked for: the peers live in other environments.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

CLASSES = 1000
MEAN, STDDEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST_AREA = 0.08


@dataclasses.dataclass
class Case:
    """What the pipeline is to do.

    Args:
        size: Side of the training images in pixels.
        batch: Images of a batch that comes out.
        layers: Operations of RandAugment an image; 0 leaves it out.
        magnitude: Their strength, 0 to 30 where 10 is a rotation by 30 degrees.
        twice: Whether a batch is mixed from twice its images, as in the paper.
        seed: Seed of what is random.
    """

    size: int
    batch: int
    layers: int
    magnitude: int
    twice: bool = False
    seed: int = 0


def ours(folder: pathlib.Path, case: Case) -> tuple[Iterable, str]:
    """Returns the batches that `nfnet train` feeds a network, and what they are."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    from nfnet_keras import data

    augment = data.Augment(
        min_area=LEAST_AREA,
        mixup=0.2,
        cutmix=1.0,
        mix_from_twice=case.twice,
        randaugment_layers=case.layers,
        randaugment_magnitude=float(case.magnitude),
    )
    names = sorted(folder.glob("*/*.jpg"))
    labels = [int(name.parent.name) for name in names]
    split = data.Split(_array(labels), paths=tuple(map(str, names)))
    batches = data.training_batches(split, CLASSES, case.size, case.batch, augment, case.seed, antialias=False)
    return batches, f"TensorFlow {tf.__version__}"


def timm(folder: pathlib.Path, case: Case) -> tuple[Iterable, str]:
    """Returns timm's own loader over its own dataset, on as many worker processes as there are cores."""
    import torch

    from benchmarks.sides.torchvision_code import load_torchvision

    library = load_torchvision()
    import PIL
    import timm
    import torchvision
    from timm.data import FastCollateMixup, create_dataset, create_loader

    mixture = FastCollateMixup(
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        mode="half" if case.twice else "elem",
        label_smoothing=0.0,
        num_classes=CLASSES,
    )
    torch.manual_seed(case.seed)
    loader = create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, case.size, case.size),
        batch_size=case.batch * (2 if case.twice else 1),
        is_training=True,
        scale=(LEAST_AREA, 1.0),
        color_jitter=0.0,
        auto_augment=f"rand-m{case.magnitude}-n{case.layers}-p1-mstd0" if case.layers else None,
        interpolation="bicubic",
        collate_fn=mixture,
        num_workers=os.cpu_count(),
        device=torch.device("cpu"),
        persistent_workers=True,
        use_multi_epochs_loader=True,
    )
    loader.keeps = library
    versions = f"timm {timm.__version__}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}"
    return loader, f"{versions}, Pillow {PIL.__version__}"


def keras(folder: pathlib.Path, case: Case) -> tuple[Iterable, str]:
    """Returns a `tf.data` pipeline of Keras's preprocessing layers."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf
    from keras import layers

    names = sorted(folder.glob("*/*.jpg"))
    labels = [int(name.parent.name) for name in names]
    # There is no layer that crops boxes of random size: the nearest is a resize of the whole image and a crop.
    enlarged = math.ceil(case.size * 8 / 7)
    resize = layers.Resizing(enlarged, enlarged, interpolation="bicubic", crop_to_aspect_ratio=True)
    crop, flip = layers.RandomCrop(case.size, case.size, seed=1), layers.RandomFlip("horizontal", seed=2)
    distort = layers.RandAugment(num_ops=case.layers, factor=case.magnitude / 30, seed=3) if case.layers else None
    mixup, cutmix = layers.MixUp(0.2, seed=4), layers.CutMix(1.0, seed=5)
    scale = layers.Normalization(
        mean=[255 * value for value in MEAN], variance=[(255 * value) ** 2 for value in STDDEV]
    )
    drawn = case.batch * (2 if case.twice else 1)

    def load(name, label):
        image = tf.io.decode_jpeg(tf.io.read_file(name), channels=3)
        image = flip(crop(resize(image), training=True), training=True)
        if distort is not None:
            # One call an image: a call with a batch would do the same operations to all its images.
            image = distort(image, training=True)
        return image, tf.one_hot(label, CLASSES)

    def mix(images, labels):
        half = drawn // 2
        first = mixup({"images": images[:half], "labels": labels[:half]}, training=True)
        rest = cutmix({"images": images[half:], "labels": labels[half:]}, training=True)
        mixed = [tf.concat([first[name], rest[name]], axis=0) for name in ("images", "labels")]
        if case.twice:
            mixed = [value[::2] for value in mixed]
        return scale(mixed[0]), mixed[1]

    batches = tf.data.Dataset.from_tensor_slices((list(map(str, names)), labels))
    batches = batches.shuffle(len(names), seed=case.seed).repeat()
    batches = batches.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(drawn, drop_remainder=True)
    batches = batches.map(mix, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return batches, f"Keras {keras.__version__}, TensorFlow {tf.__version__}"


SIDES: dict[str, Callable[[pathlib.Path, Case], tuple[Iterable, str]]] = {"ours": ours, "timm": timm, "keras": keras}


def _array(values: list[int]):
    import numpy as np

    return np.array(values, np.int32)


def processor_seconds() -> float:
    """Returns the processor's time of this process and of the workers that it has started (Linux)."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def endless(batches: Iterable) -> Iterator:
    """Gives the batches over and over."""
    while True:
        yield from batches


def watch(batches: Iterator, first: float, then: float) -> dict[str, float]:
    """Takes batches for a while that is not counted, and then for one that is.

    At both ends of what is counted a batch has just been waited for: nothing lies ready that was made before, and
    nothing is left over that was made inside.
    """
    begin = time.perf_counter()
    next(batches)
    while time.perf_counter() - begin < first:
        next(batches)
    images, processor, begin = 0, processor_seconds(), time.perf_counter()
    while time.perf_counter() - begin < then:
        images += len(next(batches)[0])
    return {
        "images": images,
        "wall": time.perf_counter() - begin,
        "processor": processor_seconds() - processor,
    }


def main() -> None:
    """Serves one side: a line with seconds in, batches for so long, a line out."""
    side, folder, *numbers = sys.argv[1:]
    size, batch, layers, magnitude, twice, seed = map(int, numbers)
    out, sys.stdout = sys.stdout, sys.stderr
    batches, about = SIDES[side](pathlib.Path(folder), Case(size, batch, layers, magnitude, bool(twice), seed))
    batches = endless(batches)
    next(batches)
    print(json.dumps({"about": about}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(watch(batches, *map(float, line.split()))), file=out, flush=True)


if __name__ == "__main__":
    main()
