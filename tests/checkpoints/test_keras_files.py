"""What Keras writes."""

import json
import shutil
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import nfnet_keras as nfk
from nfnet_keras.checkpoints.keras_files import open_archive, open_keras, open_weights
from nfnet_keras.checkpoints.stored import CheckpointError


@pytest.fixture(scope="module")
def model():
    model = nfk.create_model("nfnet_tiny", weights=None, classes=10)
    model.metadata = {"class_names": ["cat", "dog"]}
    return model


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model.save_weights(folder / "x.weights.h5")
    model.save(folder / "x.keras")
    return folder


@pytest.fixture
def weights(files, tmp_path):
    return Path(shutil.copy(files / "x.weights.h5", tmp_path))


def check(checkpoint, model):
    assert checkpoint.format == "keras" and len(checkpoint.arrays) == len(model.weights)
    for layer in model.layers:
        for variable in layer.weights:
            begin, end = f"{layer.name}/", ("gain", "0", "1")
            candidates = [
                stored.read()
                for name, stored in checkpoint.arrays.items()
                if name.startswith(begin) and name.endswith(end) and stored.shape == tuple(variable.shape)
            ]
            assert any(np.array_equal(found, variable) for found in candidates), variable.path


def test_weights(files, model):
    checkpoint = open_weights(files / "x.weights.h5")
    check(checkpoint, model)
    assert {"stem_conv0/0", "stem_conv0/gain", "stage1_block1_se/reduce/0", "predictions/1"} <= checkpoint.arrays.keys()
    stored = checkpoint.arrays["predictions/0"]
    assert stored.read().shape == stored.shape == (256, 10) and stored.dtype == stored.read().dtype == np.float32


def test_keras_archive(files, model):
    checkpoint = open_keras(files / "x.keras")
    check(checkpoint, model)
    assert checkpoint.metadata == {"class_names": ["cat", "dog"]}


def test_a_byte_of_the_weights_that_has_changed_is_found(files, tmp_path):
    # Neither HDF5 nor a number has anything that tells: the archive's checksum does.
    whole = bytearray((files / "x.keras").read_bytes())
    stored = open_keras(files / "x.keras").arrays["predictions/0"].read().tobytes()
    place = whole.find(stored[:64])
    assert place > 0
    for damaged in (place, place + len(stored) - 1):
        changed = whole.copy()
        changed[damaged] ^= 1
        (tmp_path / "x.keras").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"the archive is damaged .the checksum of model\.weights\.h5"):
            open_keras(tmp_path / "x.keras")


def test_state_of_training_is_left_out_and_nested_models_are_named(tmp_path):
    inner = keras.Sequential([keras.layers.Dense(2, name="dd"), keras.layers.Dropout(0.2)], name="inner")
    inputs = keras.layers.Input((3,))
    head = keras.layers.Dense(2, dtype="bfloat16", name="head")
    model = keras.Model(inputs, head(inner(keras.layers.Dropout(0.5)(inputs))))
    model.compile("adam", "mse")
    model.train_on_batch(np.zeros((2, 3)), np.zeros((2, 2)))
    model.save(tmp_path / "x.keras")
    arrays = open_keras(tmp_path / "x.keras").arrays
    assert sorted(arrays) == ["head/0", "head/1", "inner/layers/dd/0", "inner/layers/dd/1"]
    assert arrays["head/0"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(arrays["head/0"].read(), keras.ops.convert_to_numpy(head.kernel))


CONTAINER = "layers/dense/vars"


def external_link(file):
    file[f"{CONTAINER}/2"] = h5py.ExternalLink("other.h5", "/x")


def soft_link(file):
    file["layers/link"] = h5py.SoftLink("/layers/dense")


def external_storage(file):
    file.create_dataset(f"{CONTAINER}/2", (2,), "f4", external=[("/etc/passwd", 0, 8)])


def virtual(file):
    layout = h5py.VirtualLayout((2,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (2,))
    file.create_virtual_dataset(f"{CONTAINER}/2", layout)


def compressed(file):
    file.create_dataset(f"{CONTAINER}/2", (2**30,), "f4", compression="gzip")


def chunked(file):
    file.create_dataset(f"{CONTAINER}/2", (2**30,), "f4", chunks=(1024,))


def never_written(file):
    file.create_dataset(f"{CONTAINER}/2", (2**40,), "f4")


def objects(file):
    file.create_dataset(f"{CONTAINER}/2", (2,), h5py.string_dtype())


def references(file):
    file.create_dataset(f"{CONTAINER}/2", (2,), h5py.ref_dtype)


def complex_numbers(file):
    file[f"{CONTAINER}/2"] = np.zeros(2, complex)


def nothing(file):
    file[f"{CONTAINER}/2"] = h5py.Empty("f4")


def circle(file):
    file["layers/dense/again"] = file["layers"]


def deep(file):
    file.create_group("layers" + "/x" * 100)


def same_name(file):
    file["layers/average_pooling2d/vars"].attrs["name"] = "predictions"
    file["layers/average_pooling2d/vars/0"] = np.zeros(1)


def strange_name(file):
    file[CONTAINER].attrs["name"] = np.zeros(3)


def endless_name(file):
    file[CONTAINER].attrs["name"] = "x" * 10_000


def array_for_variables(file):
    del file[CONTAINER]
    file[CONTAINER] = np.zeros(3)


def group_for_array(file):
    file.create_group(f"{CONTAINER}/2")


def no_layers(file):
    del file["layers"]


def whole_model(file):
    del file["layers"]
    file.create_group("model_weights")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (external_link, "refused: '2' in it is a link"),
        (soft_link, "refused: 'link' in it is a link"),
        (external_storage, "refused: 'predictions/2' is compressed, in pieces or in another file"),
        (virtual, "refused: 'predictions/2' is compressed, in pieces or in another file"),
        (compressed, "refused: 'predictions/2' is compressed"),
        (chunked, "refused: 'predictions/2' is compressed, in pieces"),
        (never_written, "'predictions/2' is not whole"),
        (objects, "'predictions/2' is of type object"),
        (references, "'predictions/2' is of type object"),
        (complex_numbers, "'predictions/2' is of type complex128"),
        (nothing, "'predictions/2'|no whole"),
        (circle, "round in circles"),
        (deep, "nested too deep"),
        (same_name, "'predictions/0' twice"),
        (strange_name, "'name' in it is no text"),
        (endless_name, "empty or endless"),
        (array_for_variables, "in it is no"),
        (group_for_array, "'predictions/2' in it is no array"),
        (no_layers, "holds no layers"),
        (whole_model, "whole model in HDF5"),
    ],
)
def test_refusals(weights, damage, message):
    with h5py.File(weights, "a") as file:
        damage(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(weights)
    assert str(weights) in str(caught.value)


@pytest.mark.timeout(60)
def test_a_heap_that_would_hang_the_library(weights):
    content = bytearray(weights.read_bytes())
    place = content.index(b"GCOL") + 16
    # The first object becomes free space of no size.
    content[place : place + 16] = bytes(16)
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a heap of texts is damaged|no whole HDF5"):
        open_weights(weights)


def test_cut_short(files, weights, tmp_path):
    with open(weights, "r+b") as file:
        file.truncate(200_000)
    with pytest.raises(CheckpointError, match=r"no whole HDF5 file|not whole"):
        open_weights(weights)
    (tmp_path / "x.keras").write_bytes((files / "x.keras").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"x\.keras.* damaged"):
        open_keras(tmp_path / "x.keras")


def test_big_endian_and_bool(weights):
    with h5py.File(weights, "a") as file:
        file[f"{CONTAINER}/2"] = np.arange(3, dtype=">f4")
        file[f"{CONTAINER}/3"] = np.array([True, False])
        file[f"{CONTAINER}/4"] = np.zeros((0, 3), np.float32)
    arrays = open_weights(weights).arrays
    assert arrays["predictions/2"].read().tolist() == [0, 1, 2] and arrays["predictions/2"].dtype.isnative
    assert arrays["predictions/3"].read().tolist() == [True, False]
    assert arrays["predictions/4"].read().shape == (0, 3)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"config": {"metadata": {"a": 1}}}, {"a": 1}),
        ({"config": {"metadata": [1]}}, {}),
        ({"config": {}}, {}),
        ([1], {}),
        ("[" * 100_000, {}),
        (" " * 5 * 2**20, {}),
        (None, {}),
    ],
)
def test_configuration_is_only_read(files, tmp_path, config, expected):
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.write(files / "x.weights.h5", "model.weights.h5")
        if config is not None:
            archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
    assert open_keras(tmp_path / "x.keras").metadata == expected


def test_compressed_archive_is_refused(files, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(files / "x.weights.h5", "model.weights.h5")
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_keras(tmp_path / "x.keras")


def test_archive_of_many_parts_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for index in range(20_000):
            archive.writestr(f"{index:030}", b"")
    with pytest.raises(CheckpointError, match="far more parts"):
        open_archive(str(tmp_path / "x.keras"))
