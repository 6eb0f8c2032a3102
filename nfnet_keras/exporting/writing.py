"""A network as a file for other programs: SavedModel, ONNX, LiteRT, OpenVINO."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
from keras import ops

from nfnet_keras.exporting.description import describe
from nfnet_keras.exporting.files import check_target, finish_onnx, put_in_place, write_description, written_beside
from nfnet_keras.exporting.operations import run_for
from nfnet_keras.exporting.running import format_of, open_exported, quiet, runtime_of
from nfnet_keras.exporting.tensorflow_onnx import write_onnx
from nfnet_keras.folding import fold_weight_standardization
from nfnet_keras.openvino_engine import NEEDS as OPENVINO_NEEDS
from nfnet_keras.openvino_engine import import_openvino
from nfnet_keras.shapes import fits

# Where Keras has an exporter that was found to keep the network's outputs.
_BACKENDS = {
    "tf_saved_model": ("tensorflow", "jax"),
    "onnx": ("tensorflow", "torch"),
    "litert": ("tensorflow",),
    "openvino": ("tensorflow", "torch"),
}
_NEEDS = {
    ("onnx", "tensorflow"): ("onnx", "tf2onnx"),
    ("onnx", "torch"): ("onnx", "onnxscript"),
    ("openvino", "tensorflow"): OPENVINO_NEEDS,
    ("openvino", "torch"): OPENVINO_NEEDS,
    ("tf_saved_model", "jax"): ("tensorflow",),
}
# Largest message of protocol buffers, which ONNX's are; FlatBuffers, LiteRT's, end there too.
_LARGEST = 2**31
_TOLERANCE = 1e-3
_CHECKED_SIZE = 64
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Export:
    """What `nfk.export` wrote, and what was found of it.

    Args:
        path: The file, or the folder of a SavedModel.
        description: The JSON file that says what goes in and what comes out.
        format: The format by Keras's name.
        bytes: Size of all that belongs to it, without the description.
        runtime: Program that ran the file for the check; `None` where it is not installed, and nothing was checked.
        difference: Largest difference between the file's outputs and Keras's; `None` if `quantize` or not checked.
        agreement: Share of the images whose likeliest class is the float network's; `None` unless quantized.
        images: Number of images of `agreement`.

    Example:

    >>> Export("a.onnx", "a.onnx.json", "onnx", 10, "ONNX Runtime", 1e-6).agreement is None
    True
    """

    path: str
    description: str
    format: str
    bytes: int
    runtime: str | None = None
    difference: float | None = None
    agreement: float | None = None
    images: int = 0


def export(
    model: keras.Model,
    filepath: str | os.PathLike,
    format: str | None = None,
    *,
    include_preprocessing: bool = False,
    image_size: int | None = None,
    batch_size: int | None = None,
    quantize: str | None = None,
    representative_images: np.ndarray | None = None,
    validation_images: np.ndarray | None = None,
    io_dtype: str = "float32",
    overwrite: bool = False,
) -> Export:
    """Writes a network for programs that know neither this package nor Keras.

    The network is folded first (`fold_weight_standardization`), then written as `keras.Model.export` does, run by the
    program that the format is for, and its outputs compared with Keras's; only then it takes its name.
    Killed or out of room, it leaves what was there. A description in JSON is written with it: image size, pixel scale,
    crop, names of the classes, what the outputs are. ONNX has it in the file's metadata too.

    Two formats are written past `Model.export` on TensorFlow, with the parts that it is made of: SavedModel by
    `keras.export.ExportArchive`, because that wrote every variable twice, and ONNX by tf2onnx without the weights,
    which are put in afterwards, because NFNet-F0 took 76 seconds and 12 GB there, and takes 15 seconds and 3 GB so.

    The input is called `images`: float32 of shape (batch, height, width, channels), any batch size, normalised as the
    model asks for, or RGB pixels from 0 to 255 with `include_preprocessing`. Images must be cropped and resized before.

    | format | file | Keras's backend | packages |
    | --- | --- | --- | --- |
    | `"tf_saved_model"` | a folder | TensorFlow, JAX | |
    | `"onnx"` | .onnx | TensorFlow, PyTorch | onnx, tf2onnx (PyTorch: onnxscript) |
    | `"litert"` | .tflite | TensorFlow | |
    | `"openvino"` | .xml and .bin | TensorFlow, PyTorch | openvino |

    `pip install "nfnet-keras[export]"` brings them, and the programs for the check. A model saved under any backend
    opens under TensorFlow.

    Args:
        model: A functional Keras model of one image input; it is left as it is.
        filepath: Where to write.
        format: A row of the table; `"savedmodel"` and `"tflite"` are understood. Defaults to `None`: by the end of
            `filepath`, a SavedModel where there is none.
        include_preprocessing: Whether the file takes pixels from 0 to 255 and normalises them itself, by `mean_rgb` and
            `stddev_rgb` of `model.metadata`. Defaults to `False`: the model's input as it is.
        image_size: Side of the images in pixels. Defaults to `None`: the model's.
        batch_size: Number of images that the file takes at once. Defaults to `None`: any.
        quantize: `"int8"`: weights and activations are 8-bit integers (LiteRT only). Defaults to `None`.
        representative_images: For `quantize`: some hundred images as the file will see them, float array of shape
            (images, height, width, channels), by which the ranges of activations are found.
        validation_images: For `quantize`: images on which the likeliest class is compared with the float network's.
            Defaults to `None`: the representative ones.
        io_dtype: For `quantize`: `"float32"`, `"int8"` or `"uint8"`, what goes in and comes out. Defaults to
            `"float32"`.
        overwrite: Whether what is at `filepath` may be replaced. Defaults to `False`.

    Returns:
        What was written and found.

    Raises:
        ValueError: If an argument is wrong, the model is not functional, or the backend has no exporter of the format.
        ImportError: If a package is missing.
        FileExistsError: If there is something at `filepath`.
        RuntimeError: If the exporter fails, or what it wrote gives other outputs than Keras.

    Example:

    >>> import os, tempfile
    >>> import nfnet_keras as nfk
    >>> inputs = keras.Input((32, 32, 3))
    >>> x = keras.layers.GlobalAveragePooling2D()(nfk.layers.WSConv2D(4, 3)(inputs))
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="predictions")(x))
    >>> written = nfk.export(model, os.path.join(tempfile.mkdtemp(), "small"), format="savedmodel")
    >>> written.runtime, written.difference < 1e-5
    ('TensorFlow', True)
    """
    format = format_of(filepath, format)
    _check_arguments(format, batch_size, image_size, quantize, representative_images, io_dtype)
    _check_installed(format)
    target = Path(os.path.abspath(filepath))
    check_target(target, format, overwrite)
    network = _network(model, format, include_preprocessing, image_size, batch_size)
    size = sum(int(np.prod(weight.shape)) for weight in network.weights) * (1 if quantize else 4)
    if format in ("onnx", "litert") and size >= _LARGEST:
        raise ValueError(f"the weights are {size / 1e9:.1f} GB, and {format} holds 2.1; take savedmodel or openvino")
    images = None
    if quantize:
        images = _as_images(representative_images, network, "representative_images")
    description = describe(model, network, format, include_preprocessing)
    options = _options(quantize, io_dtype, images, batch_size)
    if quantize:
        description["quantization"] = {"weights": "int8", "activations": "int8", "inputs and outputs": io_dtype}
    with written_beside(target) as folder:
        written = folder / target.name
        _write(network, written, format, options)
        if format == "onnx":
            finish_onnx(written, description)
        found = _check(network, written, format, quantize, images, validation_images, include_preprocessing)
        place = write_description(written, format, description)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) - place.stat().st_size
        put_in_place(folder, target)
    description = os.path.join(os.path.dirname(filepath), place.relative_to(folder))
    return Export(os.fspath(filepath), description, format, size, **found)


def _check_arguments(format, batch_size, image_size, quantize, representative_images, io_dtype) -> None:
    for name, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive whole number. Received: {name}={value!r}")
    if quantize not in (None, "int8"):
        raise ValueError(f"`quantize` must be None or 'int8'. Received: quantize={quantize!r}")
    if quantize and format != "litert":
        raise ValueError(f"int8 is written as litert (.tflite) only, not as {format}")
    if quantize and representative_images is None:
        raise ValueError("`quantize` needs `representative_images`, some hundred images such as the network will see")
    if not quantize and representative_images is not None:
        raise ValueError("`representative_images` are for quantize='int8', which was not asked for")
    if io_dtype not in ("float32", "int8", "uint8"):
        raise ValueError(f"`io_dtype` must be 'float32', 'int8' or 'uint8'. Received: io_dtype={io_dtype!r}")
    if io_dtype != "float32" and not quantize:
        raise ValueError(f"io_dtype={io_dtype!r} needs quantize='int8'")


def _check_installed(format: str) -> None:
    backend = keras.backend.backend()
    if backend not in _BACKENDS[format]:
        raise ValueError(
            f"from Keras on {backend}, {format} cannot be written; from {' and '.join(_BACKENDS[format])} it can. Save "
            "the model (model.save('NAME.keras')), and export it in a program with KERAS_BACKEND=tensorflow"
        )
    missing = [name for name in _NEEDS.get((format, backend), ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{format} needs {" and ".join(missing)}: pip install "nfnet-keras[export]" or pip install '
            + " ".join(missing)
        )


def _network(model, format: str, include_preprocessing: bool, image_size: int | None, batch_size: int | None):
    """The folded network as it is written: its own input, and operations that exporters know."""
    folded = fold_weight_standardization(model, dtype="float32")
    shapes = [tuple(tensor.shape) for tensor in folded.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ValueError(f"a network of one image input is needed; this one takes inputs of the shapes {shapes}")
    height, width, channels = shapes[0][1:]
    if image_size is not None:
        height = width = image_size
    if format == "litert" and None in (height, width):
        raise ValueError("LiteRT needs to know the size of the images; say it: `image_size`, --image-size")
    images = keras.Input((height, width, channels), batch_size=batch_size, dtype="float32", name="images")
    x = images
    if include_preprocessing:
        metadata = getattr(model, "metadata", {})
        if channels != _CHANNELS or not {"mean_rgb", "stddev_rgb"} <= set(metadata):
            raise ValueError(
                "`include_preprocessing` needs mean_rgb and stddev_rgb in model.metadata and an input of three "
                f"channels, the last axis; metadata has {', '.join(metadata) or 'nothing'}, the input {shapes[0]}"
            )
        mean, stddev = (np.asarray(metadata[name], np.float64) for name in ("mean_rgb", "stddev_rgb"))
        x = keras.layers.Rescaling((1 / stddev).tolist(), (-mean / stddev).tolist(), name="normalisation")(x)
    try:
        x = [x] if isinstance(folded._inputs_struct, list) else x
        network = keras.Model(images, run_for(folded, x, format))
    except ValueError as error:
        if image_size is None:
            raise
        raise ValueError(f"the model takes no images of {image_size} x {image_size} pixels ({error})") from error
    # Keras's exporter to ONNX refuses a model that was never called.
    network(images)
    return network


def _as_images(images, network, name: str) -> np.ndarray:
    images = np.asarray(images, np.float32)
    shape = tuple(network.inputs[0].shape)[1:]
    if not fits(images.shape, (None, *shape)) or not len(images):
        raise ValueError(f"`{name}` must be images of shape {shape}. Received an array of shape {images.shape}")
    return images


def _options(quantize: str | None, io_dtype: str, images: np.ndarray | None, batch_size: int | None) -> dict:
    """Returns what Keras hands on to LiteRT's converter."""
    if not quantize:
        return {}
    import tensorflow as tf

    def representative_dataset() -> Iterator[list[np.ndarray]]:
        for start in range(0, len(images), batch_size or 1):
            yield [_filled(images[start : start + (batch_size or 1)], batch_size)]

    options = {
        "optimizations": [tf.lite.Optimize.DEFAULT],
        "representative_dataset": representative_dataset,
        "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]},
    }
    if io_dtype != "float32":
        options |= {"inference_input_type": getattr(tf, io_dtype), "inference_output_type": getattr(tf, io_dtype)}
    return options


def _filled(batch: np.ndarray, batch_size: int | None) -> np.ndarray:
    """Fills a batch up to the size that a file takes."""
    missing = (batch_size or len(batch)) - len(batch)
    return np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)]) if missing else batch


def _write(network, path: Path, format: str, options: dict) -> None:
    if format == "openvino":
        import_openvino()
    try:
        with quiet():
            on_tensorflow = keras.backend.backend() == "tensorflow"
            if on_tensorflow and format in ("tf_saved_model", "onnx"):
                {"tf_saved_model": _write_saved_model, "onnx": write_onnx}[format](network, path)
            else:
                network.export(str(path), format=format, verbose=False, **options)
    except OSError:
        raise
    except Exception as error:
        # TensorFlow's, ONNX's and OpenVINO's converters have no error in common.
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RuntimeError(
            f"Keras's exporter to {format} failed: {type(error).__name__}: {lines[0][:300] if lines else ''}"
        ) from error


def _write_saved_model(network, path: Path) -> None:
    """Writes what `Model.export` does, but every variable once; that writes TensorFlow's and Keras's own."""
    import tensorflow as tf

    archive = keras.export.ExportArchive()
    (images,) = network.inputs
    archive.add_endpoint(
        "serve",
        lambda images: network(images, training=False),
        [tf.TensorSpec(images.shape, images.dtype, name=images.name)],
    )
    archive.write_out(str(path), verbose=False)


def _check(network, path: Path, format: str, quantize, images, validation_images, pixels: bool) -> dict:
    """Runs what was written; returns what was found."""
    runtime = runtime_of(format)
    if runtime is None:
        return {}
    run = open_exported(path, format)
    batch_size, *shape = network.inputs[0].shape
    if quantize:
        if validation_images is not None:
            images = _as_images(validation_images, network, "validation_images")
        found, wanted = (_classes(f, images, batch_size) for f in (run, lambda batch: _outputs(network, batch)))
        return {"runtime": runtime, "agreement": float(np.mean(found == wanted)), "images": len(images)}
    generator = np.random.default_rng(0)
    shape = (batch_size or 2, *(_CHECKED_SIZE if n is None else n for n in shape))
    random = generator.uniform(0, 255, shape) if pixels else generator.standard_normal(shape)
    random = random.astype(np.float32)
    wanted, found = _outputs(network, random), run(random)
    differences = [float(np.abs(a - b).max()) for a, b in zip(wanted, found, strict=True)]
    bounds = [_TOLERANCE * max(1.0, float(np.abs(each).max())) for each in wanted]
    # Not `>`: NaN is wrong too.
    if not all(a.shape == b.shape for a, b in zip(wanted, found, strict=True)) or not all(
        difference <= bound for difference, bound in zip(differences, bounds, strict=True)
    ):
        raise RuntimeError(
            f"what was written as {format} does not compute what Keras does: its outputs in {runtime} differ by "
            f"{max(differences):.2g}; it was removed"
        )
    return {"runtime": runtime, "difference": max(differences)}


def _outputs(network, images: np.ndarray) -> list[np.ndarray]:
    return [ops.convert_to_numpy(output) for output in keras.tree.flatten(network.predict_on_batch(images))]


def _classes(run: Callable, images: np.ndarray, batch_size: int | None) -> np.ndarray:
    size = batch_size or 1
    found = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        found.append(run(_filled(batch, size))[0][: len(batch)].argmax(-1))
    return np.concatenate(found)
