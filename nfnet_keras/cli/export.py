"""Writes a network for other programs: as SavedModel, ONNX, LiteRT (.tflite) or OpenVINO.

MODEL is the folder of a run of `nfnet train`, a .keras file, or a name that `nfnet list` knows (with --weights, if not
the published ones). The format is told by the end of --out (.onnx, .tflite, .xml, a folder's name for SavedModel) or
by --format. Standardised kernels are folded into plain convolutions first, and what was written is run by the program
that it is for and compared with Keras before it takes its name.

A description in JSON is written beside it (into the folder of a SavedModel): size, pixel scale and crop of the images,
names of the classes, what the outputs are. The file takes images of float32 that are normalised as the network asks
for; with --include-preprocessing it takes RGB pixels from 0 to 255. Cropping and resizing are left to the program.

--int8=FOLDER writes a network of 8-bit integers, for LiteRT. By half of the images in the folder (at most 200), which
should be such as the network will see, the ranges of its numbers are found; on the other half (at most 200) its
likeliest classes are compared with those of the float network. `digits` stands for the embedded images (200 of those
for training, and the 360 held-out ones).
"""

import contextlib
import os
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from nfnet_keras.cli.opening import class_names, only_model, open_classifier, printable

ARGUMENTS = "MODEL"

_DIGITS = "digits"
# More change the ranges of activations no more; so many tell the agreement to a percent or two.
_MOST_IMAGES = 200
_FEW = 20


def define_flags() -> flags.FlagValues:
    """Returns the flags of `nfnet export`."""
    values = flags.FlagValues()
    options = {"flag_values": values}
    flags.DEFINE_string("out", None, "file or folder to write", **options)
    flags.DEFINE_enum(
        "format",
        None,
        ["savedmodel", "onnx", "litert", "openvino", "tf_saved_model", "tflite"],
        "format; without it, told by the end of --out",
        **options,
    )
    flags.DEFINE_string("weights", None, "weights of a network by name: imagenet (the default) or a file", **options)
    flags.DEFINE_integer("image_size", None, "side of the images in pixels, if not the network's", **options)
    flags.DEFINE_integer("batch_size", None, "images that the file takes at once; without it, any number", **options)
    flags.DEFINE_boolean(
        "include_preprocessing", False, "the file takes pixels from 0 to 255 and normalises them itself", **options
    )
    flags.DEFINE_string("int8", None, f"write 8-bit integers, by the images of this folder (or {_DIGITS})", **options)
    flags.DEFINE_enum(
        "io_dtype", "float32", ["float32", "int8", "uint8"], "with --int8: what goes in and comes out", **options
    )
    flags.DEFINE_boolean("overwrite", False, "replace what is at --out", **options)
    for name in ("image_size", "batch_size", "include_preprocessing", "io_dtype"):
        flags.DEFINE_alias(name.replace("_", "-"), name, flag_values=values)
    return values


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Runs `nfnet export` and returns its exit status."""
    from pathlib import Path

    from nfnet_keras._startup import _silent_stderr
    from nfnet_keras.exporting.files import check_target
    from nfnet_keras.exporting.running import format_of
    from nfnet_keras.exporting.writing import export

    name = only_model(arguments)
    if not values.out:
        raise ValueError("--out is needed, the file or folder to write, such as --out=network.onnx")
    out = values.out.rstrip("/") or values.out
    format = format_of(out, values.format)
    # Before a network is loaded for nothing.
    check_target(Path(os.path.abspath(out)), format, values.overwrite)
    if values.int8 is not None and format != "litert":
        raise ValueError(f"--int8 is for LiteRT (--format=litert, a name that ends in .tflite), not for {format}")
    files = _files(values.int8)
    model, preprocessing = open_classifier(name, values.weights, values.image_size)
    class_names(model)  # Raises where there are more or fewer than outputs.
    model.metadata = {**getattr(model, "metadata", {}), **preprocessing.to_metadata()}
    options = {}
    if values.int8 is not None:
        first, second = _images(values.int8, files, preprocessing, values.include_preprocessing)
        options = {"quantize": "int8", "representative_images": first, "validation_images": second}
    quietly = contextlib.nullcontext if os.environ.get("NFNET_TRACEBACK") else _silent_stderr
    try:
        # LiteRT's converter and interpreter report on themselves, past any setting.
        with quietly():
            written = export(
                model,
                out,
                format,
                include_preprocessing=values.include_preprocessing,
                image_size=preprocessing.image_size,
                batch_size=values.batch_size,
                io_dtype=values.io_dtype,
                overwrite=values.overwrite,
                **options,
            )
    except ImportError as error:
        raise ValueError(str(error)) from error
    _print(written, name, model, values, preprocessing, options)
    return 0


def _files(folder: str | None) -> list[str]:
    """Returns the images of the folder by which ranges are found."""
    from nfnet_keras.cli.predict import image_files

    if folder in (None, _DIGITS):
        return []
    if not os.path.isdir(folder):
        raise ValueError(f"--int8 takes a folder of images, and {folder!r} is none")
    return image_files([folder])


def _images(folder: str, files: list[str], preprocessing, pixels: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images by which ranges are found, and those on which the networks are compared."""
    if folder == _DIGITS:
        first, second = _digits(preprocessing)
    else:
        images = _loaded(files, preprocessing)
        half = (len(images) + 1) // 2
        first, second = (images[:half], images[half:]) if len(images) >= _FEW else (images, images)
    if len(first) < _FEW // 2:
        print(
            f"nfnet export: note: {len(first)} images tell little about the ranges of activations; some hundred such "
            "as the network will see are better",
            file=sys.stderr,
        )
    if not pixels:
        return first, second
    # What was loaded is normalised.
    scale, offset = np.float32(preprocessing.stddev_rgb), np.float32(preprocessing.mean_rgb)
    first, second = (first * scale + offset, None if second is first else second * scale + offset)
    return first, first if second is None else second


def _loaded(files: list[str], preprocessing) -> np.ndarray:
    from nfnet_keras.data import DataError
    from nfnet_keras.data.evaluation import load_for

    # The folder's own order is by class.
    files = np.random.default_rng(0).permutation(files)
    images, damaged = [], 0
    for file in files:
        if len(images) == 2 * _MOST_IMAGES:
            break
        try:
            images.append(load_for(str(file), preprocessing))
        except DataError as error:
            print(f"nfnet export: passed over: {printable(error)}", file=sys.stderr)
            damaged += 1
    if not images:
        raise ValueError(f"none of the {damaged} images could be read")
    return np.stack(images)


def _digits(preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Returns some of the digits for training, and the held-out ones."""
    from nfnet_keras import data

    digits = data.open_images(None)
    found = []
    for split, count in ((digits.train, _MOST_IMAGES), (digits.test, len(digits.test))):
        batches = data.evaluation_batches(
            split, len(digits.class_names), preprocessing.image_size, count, crop=preprocessing
        )
        found.append(np.asarray(next(iter(batches))[0]))
    return found[0], found[1]


def _print(written, name: str, model, values: flags.FlagValues, preprocessing, options: dict) -> None:
    size = preprocessing.image_size
    scale = "RGB from 0 to 255" if values.include_preprocessing else "RGB, normalised (mean_rgb, stddev_rgb)"
    rows = {
        "file": written.path,
        "format": written.format + (f", int8, {values.io_dtype} in and out" if options else ""),
        "network": name,
        "input": f"images: ({values.batch_size or 'any'}, {size}, {size}, 3), {scale}",
        "classes": model.output_shape[-1],
        "bytes": f"{written.bytes:,}",
        "description": written.description,
        "check": _finding(written, options),
    }
    for title, value in rows.items():
        print(printable(f"{title:13}{value}"))


def _finding(written, options: dict) -> str:
    if written.runtime is None:
        return 'not run: pip install "nfnet-keras[export]" brings the program for it'
    if written.difference is not None:
        return f"outputs in {written.runtime} differ from Keras's by at most {written.difference:.1g}"
    held_out = options["validation_images"] is not options["representative_images"]
    which = "images that were not used for the ranges" if held_out else "images, the same that gave the ranges"
    share = f"{100 * written.agreement:.1f} %"
    return f"{share} of {written.images} {which} get the float network's class in {written.runtime}"
