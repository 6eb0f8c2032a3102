"""Measures a network on images whose classes are known: top-1 and top-5, loss, and the accuracy of each class.

MODEL is the folder of a run of `nfnet train`, a .keras file, or a name that `nfnet list` knows (with --weights, if not
the published ones). A run is measured on the held-out images of what it was trained on; --data names others, in the
same words as `nfnet train`, and `digits` for the embedded set (a folder of that name is ./digits). Of another folder
than the run's all images are taken, unless it has train/ and test/. Classes are matched by name, ImageNet's by their
WordNet ids or by their names. --out=FOLDER keeps the numbers as report.json and a picture of which class was taken for
which as confusion.png.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import flags

from nfnet_keras.cli.opening import class_names, folded, model_file, only_model, open_classifier, printable

ARGUMENTS = "MODEL"
REPORT, PICTURE = "report.json", "confusion.png"
DIGITS = "digits"

_WORST = 10
_SECONDS_BETWEEN_LINES = 10.0


def define_flags() -> flags.FlagValues:
    """Returns the flags of `nfnet evaluate`."""
    values = flags.FlagValues()
    options = {"flag_values": values}
    flags.DEFINE_string("weights", None, "weights of a network by name: imagenet (the default) or a file", **options)
    flags.DEFINE_string(
        "data", None, "images, as for `nfnet train`, or digits; without it, those of the run", **options
    )
    flags.DEFINE_string("data_dir", None, "folder of TensorFlow Datasets", **options)
    flags.DEFINE_enum(
        "split", None, ["test", "train", "all"], "which of the images; without it, the held-out ones", **options
    )
    flags.DEFINE_integer("batch_size", 32, "images that the network sees at once", lower_bound=1, **options)
    flags.DEFINE_integer("image_size", None, "side of the images in pixels, if not the network's", **options)
    flags.DEFINE_string(
        "crop", None, "how images are cut, such as resize_crop_32; without it, the network's", **options
    )
    flags.DEFINE_boolean("all", False, f"list every class, not the {_WORST} worst", **options)
    flags.DEFINE_boolean("json", False, "print JSON instead of a table", **options)
    flags.DEFINE_string("out", None, f"folder for {REPORT} and {PICTURE}", **options)
    for name in ("data_dir", "batch_size", "image_size"):
        flags.DEFINE_alias(name.replace("_", "-"), name, flag_values=values)
    return values


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Runs `nfnet evaluate` and returns its exit status."""
    name = only_model(arguments)
    from nfnet_keras import data
    from nfnet_keras.training.evaluating import evaluate
    from nfnet_keras.training.run_folder import RunFolder

    spec, data_dir, own = _images_asked_for(values, name)
    model, preprocessing = open_classifier(name, values.weights, values.image_size)
    if values.crop:
        preprocessing = dataclasses.replace(preprocessing, crop=values.crop)
    if values.out:
        # Before the hours that an evaluation may take.
        with RunFolder(values.out).reporting():
            os.makedirs(values.out, exist_ok=True)
    images = data.open_images(spec, data_dir)
    if _numbered(images.class_names) and (spec or "").startswith("tfrecord:"):
        # Files that do not name their classes need not have images of all of them either.
        images = data.open_images(spec, data_dir, model.output_shape[-1])
    kind = values.split or ("all" if not own and _undivided(spec) else "test")
    names, places = _matched(model, images.class_names)
    split = _chosen(images, kind)
    batches = _prepared(split, places, preprocessing, values.batch_size)
    report = evaluate(folded(model), _announced(batches, len(split)), names)
    about = {
        "model": name,
        "weights": values.weights,
        "data": images.name,
        "split": kind,
        "image_size": preprocessing.image_size,
        "crop": preprocessing.crop,
    }
    if values.json:
        print(json.dumps({**about, **report.to_dict()}, indent=2))
    else:
        print(_text(report, about, values.all))
    if values.out:
        _keep(report, about, values.out)
    return 0


def _images_asked_for(values: flags.FlagValues, name: str) -> tuple[str | None, str | None, bool]:
    """Returns which images, the folder of TensorFlow Datasets, and whether the run was trained on them."""
    config = _config_of_run(name)
    if values.data is not None:
        spec = None if values.data == DIGITS else values.data
        return spec, values.data_dir, config is not None and _same(spec, config.get("data"))
    if config is None:
        raise ValueError(
            f"say with --data on which images to evaluate {name!r}: a folder of class folders, tfds:NAME, "
            f"tfrecord:PATTERN or {DIGITS}; only the folder of a run tells by itself"
        )
    return config.get("data"), values.data_dir or config.get("data_dir"), True


def _same(spec: str | None, used: str | None) -> bool:
    return spec == used or (None not in (spec, used) and os.path.abspath(spec) == os.path.abspath(used))


def _config_of_run(name: str) -> dict | None:
    from nfnet_keras.training.run_folder import CONFIG

    path = model_file(name, f"a file of weights goes with the name of its network: NAME --weights={name}")
    config = None if path is None else os.path.join(os.path.dirname(path), CONFIG)
    if config is None or not os.path.isfile(config):
        return None
    try:
        with open(config, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"the settings of the run, {config!r}, cannot be read ({error}); give --data") from error
    return found if isinstance(found, dict) else None


def _undivided(spec: str | None) -> bool:
    """Whether the images are a folder that does not say which of them are held out."""
    if spec is None or not os.path.isdir(spec):
        return False
    inside = [os.path.isdir(os.path.join(spec, name)) for name in ("train", "test", "val", "validation")]
    return not (inside[0] and any(inside[1:]))


def _chosen(images, kind: str):
    """Returns the images to evaluate on."""
    from nfnet_keras.data import Split

    if kind != "all":
        return getattr(images, kind)
    both = images.train, images.test
    if not all(isinstance(split, Split) for split in both):
        raise ValueError(f"--split=all is for folders; evaluate on {images.name} with --split=test or --split=train")
    labels = np.concatenate([split.labels for split in both])
    if both[0].paths is None:
        return Split(labels, images=np.concatenate([split.images for split in both]))
    return Split(labels, paths=(*both[0].paths, *both[1].paths))


def _matched(model, data_names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns the names of the model's classes, and which of them each class of the data is."""
    from nfnet_keras.applications.labels import imagenet_classes
    from nfnet_keras.training.evaluating import match_classes

    names, ids = class_names(model)
    if not getattr(model, "metadata", {}).get("class_names"):
        wnids = {wnid for wnid, _ in imagenet_classes()}
        if len(names) == len(wnids) and wnids.issuperset(data_names):
            ids, names = map(list, zip(*imagenet_classes(), strict=True))
        elif len(names) == len(data_names):
            _note("the model does not name its classes: those of the data are taken, in their order")
            return list(data_names), np.arange(len(data_names))
        else:
            raise ValueError(
                f"the model has {len(names)} classes without names, and the data has {len(data_names)}; evaluate on "
                "the classes that it was trained on, or save the model with metadata['class_names']"
            )
    if _numbered(data_names) and len(data_names) == len(names) and not set(data_names) & set(names):
        _note("the data numbers its classes: the numbers are taken for those of the model's outputs")
        return names, np.arange(len(names))
    places = match_classes(names, data_names, ids)
    if len(places) < len(names):
        _note(f"the data has {len(places)} of the model's {len(names)} classes; it is measured on these")
    elif (places != np.arange(len(names))).any():
        _note("the data's classes are in another order than the model's; they are matched by name")
    return names, places


def _numbered(names: Sequence[str]) -> bool:
    """Whether classes have no names but their numbers, from 0 or from 1."""
    return any(list(names) == [str(first + i) for i in range(len(names))] for first in (0, 1))


def _note(text: str) -> None:
    print(f"nfnet evaluate: note: {printable(text)}", file=sys.stderr)


def _prepared(split, places: np.ndarray, preprocessing, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches made ready for the model, labelled by its own classes."""
    from nfnet_keras import data

    broken = data.BrokenImages(len(split))
    size = preprocessing.image_size
    batches = data.evaluation_batches(split, len(places), size, batch_size, crop=preprocessing, ledger=broken)
    try:
        for images, labels in batches.as_numpy_iterator():
            yield images, places[labels.argmax(axis=1)]
    finally:
        # What broke inside TensorFlow's pipeline comes out as an error of its own; the ledger knows the reason.
        broken.check()
    if broken.count:
        _note(
            f"{broken.count} images are broken, and others of their batches were counted twice: {broken.names[0]} ..."
        )


def _announced(batches: Iterable, images: int) -> Iterator:
    """Passes batches on, and says on a terminal how far it is."""
    done, said = 0, time.monotonic()
    for batch in batches:
        yield batch
        done += len(batch[1])
        if sys.stderr.isatty() and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"nfnet evaluate: {done} of {images} images", file=sys.stderr)


def _text(report, about: dict, every: bool) -> str:
    size = about["image_size"]
    kind = {"test": "held-out images", "train": "training images", "all": "images"}[about["split"]]
    top5 = [] if report.top5 is None else [f"top-5  {100 * report.top5:6.2f} %"]
    lines = [
        f"{printable(about['model'])} on {printable(about['data'])}: {report.images} {kind}, {size} x {size} pixels",
        "",
        f"top-1  {100 * report.top1:6.2f} %",
        *(top5 or ["top-5       -   (there are no more than 5 classes)"]),
        f"loss   {report.loss:8.4f}",
        "",
    ]
    # The worst first; of equally good ones, those of more images, about which more is known.
    rows = sorted((row for row in report.per_class if row.images), key=lambda row: (row.accuracy, -row.images))
    shown = rows if every else rows[:_WORST]
    width = max(len("class"), *(len(printable(row.name)) for row in shown))
    lines.append(f"{'class':{width}}  images  right  accuracy")
    lines += [
        f"{printable(row.name):{width}}  {row.images:6}  {row.right:5}  {100 * row.accuracy:6.2f} %" for row in shown
    ]
    if len(shown) < len(rows):
        lines.append(f"(the {len(shown)} worst of {len(rows)} classes; --all lists all)")
    return "\n".join(lines)


def _keep(report, about: dict, folder: str) -> None:
    from pathlib import Path

    from nfnet_keras.training.evaluating import confusion_picture
    from nfnet_keras.training.files import written_aside

    with written_aside(Path(folder) / REPORT) as aside:
        aside.write_text(json.dumps({**about, **report.to_dict()}, indent=2) + "\n")
    with written_aside(Path(folder) / PICTURE) as aside:
        confusion_picture(report, aside)
    print(f"{REPORT} and {PICTURE} are in {folder}", file=sys.stderr)
