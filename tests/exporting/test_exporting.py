"""Exported networks: what other programs make of the files, and what is left when something goes wrong."""

import json
import os
import signal
import subprocess
import sys

import keras
import kinds
import numpy as np
import pytest
import seeded
from keras import ops

import nfnet_keras as nfk
from nfnet_keras.exporting import writing as exporting
from nfnet_keras.exporting.running import format_of, open_exported

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends: in processes below")

FORMATS = {"tf_saved_model": "", "onnx": ".onnx", "litert": ".tflite", "openvino": ".xml"}
FAMILIES = ("nfnet_f0", "nf_regnet_b0", "nf_resnet50", "timm_dm_nfnet_f0", "timm_nf_resnet50", "timm_eca_nfnet_l0")
SMALL = """
import nfnet_keras as nfk
inputs = keras.Input((16, 16, 3))
x = keras.layers.GlobalAveragePooling2D()(nfk.layers.WSConv2D(8, 3)(inputs))
model = keras.Model(inputs, keras.layers.Dense(3, name="predictions")(x))
"""


def draw(model):
    """Gives every parameter a value: what starts at zero would hide the branches and the classifier."""
    for variable in model.trainable_variables:
        layer, _, parameter = variable.path.rpartition("/")
        variable.assign(seeded.array(layer, parameter, variable.shape, 1))
    return model


def tiny(**options):
    given = {"weights": None, "input_shape": (32, 32, 3), "classes": 10, "classifier_activation": None, **options}
    return draw(nfk.create_model("nfnet_tiny", **given))


def small(**options):
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.GlobalAveragePooling2D()(nfk.layers.WSConv2D(8, 3, activation="relu")(inputs))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(3, name="predictions", **options)(x))
    model.metadata = {
        "class_names": ["red", "green", "bleu é"],
        "image_size": 16,
        "mean_rgb": [120.0, 110.0, 100.0],
        "stddev_rgb": [60.0, 50.0, 40.0],
        "crop": "center_0.8",
    }
    return model


def onnx_runtime(path, images):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


def litert(path, images):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(taken["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(given["index"])


RUN = {"onnx": onnx_runtime, "litert": litert, "openvino": lambda path, images: open_exported(path)(images)[0]}
CASES = [("nfnet_tiny", "onnx"), ("timm_eca_nfnet_l0", "litert")]
LATER = [(name, format) for name in ("nfnet_tiny", *FAMILIES) for format in ("onnx", "litert")]
LATER = [*LATER, ("nfnet_tiny", "openvino")]


@pytest.mark.parametrize(
    ("name", "format"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in LATER if case not in CASES]
)
def test_logits_after_a_round_trip(tmp_path, name, format):
    options = {"classes": 10, "classifier_activation": None}
    model = tiny() if name == "nfnet_tiny" else draw(kinds.make(name, **options, input_shape=(64, 64, 3)))
    path = tmp_path / f"network{FORMATS[format]}"
    written = nfk.export(model, path, format)
    assert written.format == format
    # Any number of images: not the two of the program's own check.
    images = seeded.image((3, *model.input_shape[1:]), 5)
    wanted = ops.convert_to_numpy(model(images))
    found = RUN[format](path, images)
    assert np.ptp(wanted) > 0.1
    assert np.abs(wanted - found).max() < 1e-3 * max(1.0, np.abs(wanted).max())
    assert written.difference < 1e-3


@pytest.mark.slow
def test_saved_model_in_plain_tensorflow(tmp_path, new_process):
    model = small()
    images = np.random.default_rng(0).standard_normal((5, 16, 16, 3)).astype(np.float32)
    written = nfk.export(model, tmp_path / "network")
    np.save(tmp_path / "images.npy", images)
    code = """
import sys
import tensorflow as tf
loaded = tf.saved_model.load("network")
images = np.load("images.npy")
(signed,) = loaded.signatures["serving_default"](images=images).values()
report([loaded.serve(images).numpy().tolist(), signed.shape[0], "nfnet_keras" in sys.modules])
"""
    found, shape, imported = new_process(code)
    np.testing.assert_allclose(found, ops.convert_to_numpy(model(images)), rtol=1e-4, atol=1e-5)
    assert shape == 5
    assert not imported
    # Each variable once: 8 x 27 + 8 of the convolution, 8 x 3 + 3 of the classifier.
    data = tmp_path / "network/variables/variables.data-00000-of-00001"
    assert 4 * 251 <= data.stat().st_size < 2 * 4 * 251
    assert json.loads((tmp_path / "network/assets.extra/nfnet_keras.json").read_text())["format"] == "tf_saved_model"
    assert written.bytes > data.stat().st_size


def test_pixels_and_description(tmp_path):
    import onnx

    model, path = small(activation="softmax"), tmp_path / "network.onnx"
    nfk.export(model, path, include_preprocessing=True, batch_size=2)
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    metadata = model.metadata
    normalised = (pixels - np.float32(metadata["mean_rgb"])) / np.float32(metadata["stddev_rgb"])
    np.testing.assert_allclose(onnx_runtime(path, pixels), ops.convert_to_numpy(model(normalised)), atol=1e-5)
    described = json.loads((tmp_path / "network.onnx.json").read_text())
    assert described["class_names"] == metadata["class_names"]
    assert described["input"]["shape"] == [2, 16, 16, 3]
    assert described["input"]["pixels"] == "RGB, 0 to 255"
    assert described["input"]["made_by"].startswith("turn upright by the EXIF orientation")
    assert described["outputs"] == [{"kind": "probabilities", "shape": [2, 3]}]
    stored = onnx.load(str(path))
    inside = {each.key: each.value for each in stored.metadata_props}
    assert json.loads(inside["class_names"]) == metadata["class_names"]
    assert [each.name for each in stored.graph.output] == ["probabilities"]


def test_another_size_and_several_outputs(tmp_path):
    inputs = keras.Input((None, None, 3))
    first = nfk.layers.WSConv2D(8, 3, strides=2, padding="same")(inputs)
    model = keras.Model([inputs], [first, nfk.layers.WSConv2D(4, 3, groups=2, name="second")(first)])
    images = np.random.default_rng(0).standard_normal((1, 20, 20, 3)).astype(np.float32)
    for name, options in (("fixed.onnx", {"image_size": 20}), ("any.onnx", {}), ("fixed.tflite", {"image_size": 20})):
        assert nfk.export(model, tmp_path / name, **options).difference < 1e-4
        for wanted, output in zip(model([images]), open_exported(tmp_path / name)(images), strict=True):
            np.testing.assert_allclose(output, ops.convert_to_numpy(wanted), atol=1e-4)


@pytest.mark.parametrize("io_dtype", ["float32", "int8"])
def test_int8(tmp_path, io_dtype):
    model, path = small(), tmp_path / "network.tflite"
    generator = np.random.default_rng(0)
    images = generator.standard_normal((40, 1, 1, 3)) + 0.3 * generator.standard_normal((40, 16, 16, 3))
    images = images.astype(np.float32)
    written = nfk.export(
        model,
        path,
        quantize="int8",
        representative_images=images,
        validation_images=images[20:],
        io_dtype=io_dtype,
    )
    assert written.images == 20 and written.difference is None
    wanted = ops.convert_to_numpy(model(images[20:]))
    found = open_exported(path)(images[20:])[0]
    assert written.agreement == np.mean(wanted.argmax(-1) == found.argmax(-1)) > 0.8
    assert 0 < np.abs(wanted - found).max() < 0.05 * np.ptp(wanted)
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    assert interpreter.get_input_details()[0]["dtype"] == np.dtype(io_dtype)
    kernels = [each for each in interpreter.get_tensor_details() if tuple(each["shape"]) == (8, 3, 3, 3)]
    assert [each["dtype"] for each in kernels] == [np.int8]


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch):
    """A converter that computes something else is found out before the file takes its name."""
    monkeypatch.setattr(exporting, "open_exported", lambda *_: lambda images: [np.full((2, 3), 0.5, np.float32)])
    with pytest.raises(RuntimeError, match="does not compute what Keras does"):
        nfk.export(small(), tmp_path / "network")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["tf_saved_model", "onnx"])
def test_what_was_there_stays_when_the_exporter_fails(tmp_path, monkeypatch, format):
    path = tmp_path / f"network{FORMATS[format]}"
    nfk.export(small(), path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def fail(network, place):
        place.with_suffix(".half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, {"onnx": "write_onnx", "tf_saved_model": "_write_saved_model"}[format], fail)
    with pytest.raises(FileExistsError, match="is there already"):
        nfk.export(small(), path)
    with pytest.raises(OSError, match="No space left"):
        nfk.export(small(), path, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    monkeypatch.undo()
    nfk.export(small(activation="softmax"), path, overwrite=True)
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == set(before)
    assert any(file.read_bytes() != content for file, content in before.items())


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs/cat.jpg").write_text("cat")
    with pytest.raises(FileExistsError, match="is no SavedModel"):
        nfk.export(small(), tmp_path / "photographs", overwrite=True)
    (tmp_path / "a.onnx").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        nfk.export(small(), tmp_path / "a.onnx", overwrite=True)
    assert (tmp_path / "photographs/cat.jpg").read_text() == "cat"


def test_formats_by_name():
    assert [format_of(f"a{suffix}") for suffix in FORMATS.values()] == list(FORMATS)
    assert format_of("a.tflite", "tflite") == "litert"
    for arguments, message in (
        (("a.pb",), "tells no format"),
        (("a.onnx", "litert"), "ends in .tflite"),
        (("a.onnx", "savedmodel"), "a SavedModel is a folder"),
        (("a", "torchscript"), "there is no format 'torchscript'"),
    ):
        with pytest.raises(ValueError, match=message):
            format_of(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx", "quantize": "int8", "representative_images": np.zeros((1, 16, 16, 3))}, "litert"),
        ({"format": "litert", "quantize": "int8"}, "needs `representative_images`"),
        ({"format": "litert", "quantize": "int4"}, "must be None or 'int8'"),
        ({"format": "litert", "quantize": "int8", "representative_images": np.zeros((2, 8, 8, 3))}, "shape"),
        ({"format": "litert", "representative_images": np.zeros((1, 16, 16, 3))}, "quantize='int8'"),
        ({"format": "litert", "io_dtype": "int8"}, "needs quantize"),
        ({"format": "onnx", "batch_size": 0}, "`batch_size` must be a positive"),
    ],
)
def test_arguments_that_are_wrong(tmp_path, options, message):
    path = tmp_path / f"a{FORMATS[options['format']]}"
    with pytest.raises(ValueError, match=message):
        nfk.export(small(), path, **options)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported(tmp_path):
    model = small()
    model.metadata = {}
    with pytest.raises(ValueError, match="needs mean_rgb and stddev_rgb"):
        nfk.export(model, tmp_path / "a", include_preprocessing=True)
    with pytest.raises(ValueError, match="size of the images"):
        nfk.export(tiny(input_shape=(None, None, 3)), tmp_path / "a.tflite")
    flat = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="one image input"):
        nfk.export(flat, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="make it first"):
        nfk.export(model, tmp_path / "no/a.onnx")


def test_missing_packages_and_programs(tmp_path, monkeypatch):
    real = exporting.importlib.util.find_spec
    missing = {"tf2onnx", "onnxruntime"}
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda name, *more: None if name in missing else real(name, *more)
    )
    with pytest.raises(ImportError, match=r"pip install \"nfnet-keras\[export\]\" or pip install tf2onnx"):
        nfk.export(small(), tmp_path / "a.onnx")
    missing.remove("tf2onnx")
    written = nfk.export(small(), tmp_path / "a.onnx")
    assert written.runtime is None and written.difference is None
    with pytest.raises(ImportError, match='pip install "onnxruntime"'):
        open_exported(tmp_path / "a.onnx")


@pytest.mark.slow
def test_killed_or_out_of_room(tmp_path, new_process):
    """SIGKILL while it is written leaves a hidden folder, which the next export removes; a full disk leaves nothing."""
    waits = "exporting.write_onnx = lambda *_: (print('writing', flush=True), time.sleep(60))"
    imports = "import time, keras\nfrom nfnet_keras.exporting import writing as exporting"
    code = f"{imports}\n{SMALL}\n{waits}\nnfk.export(model, 'a.onnx')"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env=os.environ | _path()) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name == f".a.onnx.{process.pid}.exporting"
    limited = f"""
import resource, signal
{SMALL}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
said = []
for name in ("a.onnx", "a.tflite", "a.xml", "a"):
    try:
        nfk.export(model, name)
    except (OSError, RuntimeError) as error:
        said.append(name)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
report(said)
"""
    assert new_process("import keras\n" + limited) == ["a.onnx", "a.tflite", "a.xml", "a"]
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def _path() -> dict:
    root = os.path.dirname(os.path.dirname(nfk.__file__))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "can"), [("jax", ["tf_saved_model"]), ("torch", ["onnx", "openvino"])], ids=["jax", "torch"]
)
def test_other_backends(new_process, backend, can):
    code = f"""
import keras
{SMALL}
found = {{}}
for format, name in (("tf_saved_model", "a"), ("onnx", "a.onnx"), ("litert", "a.tflite"), ("openvino", "a.xml")):
    try:
        found[format] = nfk.export(model, name, include_preprocessing=False).difference
    except ValueError as error:
        found[format] = str(error)
report(found)
"""
    found = new_process(code, env={"KERAS_BACKEND": backend})
    for format, result in found.items():
        if format in can:
            assert result < 1e-4, (format, result)
        else:
            assert f"from Keras on {backend}, {format} cannot be written" in result
            assert "KERAS_BACKEND=tensorflow" in result
