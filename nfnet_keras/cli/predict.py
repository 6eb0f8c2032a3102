"""Names what is in images.

Each IMAGE is a file (JPEG, PNG, GIF, BMP, WebP) or a folder, which is searched with all its subfolders. Without flags
NFNet-F0 names the likeliest of ImageNet's 1000 classes; with --model=FOLDER, the folder of a run of `nfnet train`, the
trained network names its own. An image that cannot be read is named and passed over; the exit status is then 1.

--explain=OUT.png also draws where in each image the network saw the likeliest class (Grad-CAM): the image as the
network gets it, and beside it the same under a heat map. All images come into one picture.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from nfnet_keras.cli.opening import class_names, folded, open_classifier, printable
from nfnet_keras.cli.pictures import picture_path, write_picture

ARGUMENTS = "IMAGE..."

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
"""The files of a folder that are taken for images."""

# Compiling NFNet-F0 takes a second and then halves the time of an image: it pays for more images than these.
_FEW = 4

# Handing it to OpenVINO takes eight seconds, and saves half a tenth of one for each image.
_MANY = 200

# One picture of more pairs would be taller than 50 inches.
_MOST_EXPLAINED = 30
_LONGEST_TITLE = 48


def define_flags() -> flags.FlagValues:
    """Returns the flags of `nfnet predict`."""
    values = flags.FlagValues()
    options = {"flag_values": values}
    flags.DEFINE_string(
        "model", "nfnet_f0", "name of a network (`nfnet list`), a .keras file, or the folder of a run", **options
    )
    flags.DEFINE_string("weights", None, "weights of a network by name: imagenet (the default) or a file", **options)
    flags.DEFINE_integer("top", 5, "classes to name for each image", lower_bound=1, **options)
    flags.DEFINE_boolean("json", False, "print JSON instead of a table", **options)
    flags.DEFINE_enum(
        "engine",
        "auto",
        ["auto", "keras", "openvino"],
        "what computes: Keras, or OpenVINO (`pip install openvino`), which is faster on a CPU and takes seconds to "
        f"start; auto takes it for more than {_MANY} images, where it is installed",
        **options,
    )
    flags.DEFINE_string(
        "explain",
        None,
        f"file of a picture to write: where in the images, {_MOST_EXPLAINED} at most, the likeliest class was seen",
        **options,
    )
    flags.DEFINE_integer("batch_size", 8, "images that the network sees at once", lower_bound=1, **options)
    flags.DEFINE_integer("image_size", None, "side of the images in pixels, if not the network's", **options)
    for name in ("batch_size", "image_size"):
        flags.DEFINE_alias(name.replace("_", "-"), name, flag_values=values)
    return values


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Runs `nfnet predict` and returns its exit status."""
    files = image_files(arguments)
    picture = None if values.explain is None else picture_path(values.explain, "--explain", files)
    if picture is not None and len(files) > _MOST_EXPLAINED:
        raise ValueError(f"--explain draws {_MOST_EXPLAINED} images at most; these are {len(files)}")
    model, preprocessing = open_classifier(values.model, values.weights, values.image_size, "--model=NAME")
    if picture is not None:
        _check_layers(model)
    names, ids = class_names(model)
    found, likeliest, damaged = [], {}, 0
    engine = "keras" if values.engine == "auto" and len(files) <= _MANY else values.engine
    for file, outcome in _outcomes(model, files, preprocessing, values.batch_size, engine):
        if isinstance(outcome, ValueError):
            if len(files) == 1:
                raise outcome
            print(f"nfnet predict: passed over: {printable(outcome)}", file=sys.stderr)
            damaged += 1
            continue
        best = _best(outcome, names, ids, values.top)
        likeliest[file] = best[0]
        if values.json:
            found.append({"file": file, "predictions": best})
        else:
            _print_table(file, best)
    if values.json:
        print(json.dumps(found, indent=2))
    if picture is not None and likeliest:
        _explain(model, likeliest, preprocessing, values.batch_size, picture)
    if damaged:
        print(f"nfnet predict: error: {damaged} of {len(files)} images could not be read", file=sys.stderr)
    return 1 if damaged else 0


def image_files(arguments: Sequence[str]) -> list[str]:
    """Returns the files that are named, and those of the folders that are."""
    if not arguments:
        raise ValueError("no image is given; name files or folders: nfnet predict IMAGE...")
    files = []
    for argument in arguments:
        files += _files_of_folder(argument) if os.path.isdir(argument) else [argument]
    if not files:
        raise ValueError(f"no images in {', '.join(map(repr, arguments))}; looked for {', '.join(SUFFIXES)}")
    if not any(os.path.exists(file) for file in files):
        # Said before a network is loaded for nothing.
        raise ValueError(f"image file does not exist: {files[0]!r}; check the path")
    return files


def _files_of_folder(folder: str) -> list[str]:
    files = []
    for place, inner, names in os.walk(folder, onerror=_refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        files += [
            os.path.join(place, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(files)


def _refuse(error: OSError) -> None:
    raise error


def _outcomes(
    model, files: list[str], preprocessing, batch_size: int, engine: str
) -> Iterator[tuple[str, np.ndarray | ValueError]]:
    """Yields each file with its classes' probabilities, or with why it cannot be read."""
    from nfnet_keras.data import DataError
    from nfnet_keras.data.evaluation import load_for

    predict = _predictor(model, engine, compiled=len(files) > min(batch_size, _FEW))
    # Every batch has the same shape, because another one would be compiled anew.
    batch = np.zeros((min(batch_size, len(files)), preprocessing.image_size, preprocessing.image_size, 3), np.float32)
    for start in range(0, len(files), batch_size):
        outcomes, whole = {}, []
        for file in files[start : start + batch_size]:
            try:
                batch[len(whole)] = load_for(file, preprocessing)
                whole.append(file)
            except DataError as error:
                outcomes[file] = error
        if whole:
            outcomes.update(zip(whole, predict(batch), strict=False))
        for file in files[start : start + batch_size]:
            yield file, outcomes[file]


def _predictor(model, engine: str, compiled: bool):
    """Returns a function from a batch of images to their classes' probabilities."""
    import keras

    from nfnet_keras.folding import can_fold
    from nfnet_keras.inference import Predictor
    from nfnet_keras.training.evaluating import gives_logits

    logits = gives_logits(model)
    if engine != "keras" and can_fold(model):
        try:
            run = Predictor(model, engine)
        except ImportError as error:
            raise ValueError(str(error)) from error
    else:
        run = _by_keras(folded(model), compiled)

    def predict(batch: np.ndarray) -> np.ndarray:
        outputs = keras.ops.cast(run(batch), "float32")
        return keras.ops.convert_to_numpy(keras.ops.softmax(outputs) if logits else outputs)

    return predict


def _by_keras(model, compiled: bool):
    import keras

    # Called directly, JAX would compile every operation by itself, and PyTorch keep all for a gradient.
    if compiled or keras.backend.backend() != "tensorflow":
        return model.predict_on_batch
    return lambda batch: model(batch, training=False)


def _check_layers(model) -> None:
    from nfnet_keras.diagnostics.graph import functional

    if functional(model) is None:
        raise ValueError(f"--explain needs a model whose layers Keras knows; this one is a {type(model).__name__}")


def _explain(model, likeliest: dict[str, dict], preprocessing, batch_size: int, path) -> None:
    """Draws where in each file its likeliest class was seen."""
    from nfnet_keras.data.evaluation import load_for
    from nfnet_keras.diagnostics.explaining import grad_cam, plot_explanations

    files = list(likeliest)
    images = np.stack([load_for(file, preprocessing) for file in files])
    classes = [likeliest[file]["class"] for file in files]
    maps = [
        grad_cam(model, images[start : start + batch_size], classes[start : start + batch_size])
        for start in range(0, len(files), batch_size)
    ]
    pixels = images * np.asarray(preprocessing.stddev_rgb) + np.asarray(preprocessing.mean_rgb)
    titles = []
    for best in likeliest.values():
        name = printable(best["name"])
        short = name if len(name) <= _LONGEST_TITLE else name[: _LONGEST_TITLE - 3] + "..."
        titles.append(f"{short}: {100 * best['probability']:.1f} %")
    write_picture(plot_explanations(np.rint(pixels), np.concatenate(maps), titles), path)


def _best(probabilities: np.ndarray, names: list[str], ids: list[str] | None, top: int) -> list[dict]:
    if not np.isfinite(probabilities).all():
        raise ValueError("the model's outputs are no numbers (NaN); its weights are damaged or it was not trained well")
    best = []
    for i in np.argsort(-probabilities, kind="stable")[:top]:
        entry = {"class": int(i), "name": names[i], "probability": float(probabilities[i])}
        best.append({**entry, "id": ids[i]} if ids else entry)
    return best


def _print_table(file: str, best: list[dict]) -> None:
    width = int(math.log10(len(best))) + 1
    print(printable(file))
    for rank, entry in enumerate(best, start=1):
        print(f"  {rank:{width}}  {100 * entry['probability']:6.2f} %  {printable(entry['name'])}")
