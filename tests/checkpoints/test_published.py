"""`weights="imagenet"` from beginning to end, with a server on this machine in the place of the publishers'."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import judge
import keras
import numpy as np
import pytest
import safetensors.numpy
import seeded
from PIL import Image

import nfnet_keras as nfk
from nfnet_keras.applications.labels import imagenet_classes
from nfnet_keras.checkpoints import CheckpointError, manifest, open_checkpoint
from nfnet_keras.checkpoints.names import own_variables
from nfnet_keras.cli.main import main

ROOT = Path(__file__).parents[2]
NAME = "timm_test_nfnet"
ADDRESS = "/mirror/timm/test_nfnet.r160_in1k/resolve/main/model.safetensors"
GOLDEN = judge.numbers("timm_logits", "test_nfnet")
SEED = int(GOLDEN["seed"])
files_only = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="files, the same on every backend")


def filled() -> dict[str, np.ndarray]:
    """The parameters of the golden numbers, as timm's file has them."""
    tree = seeded.fill(judge.tree("timm", "test_nfnet"), SEED, "OIHW")
    return {f"{module}.{name}": array for module, arrays in tree.items() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def file() -> bytes:
    return safetensors.numpy.save(filled())


@pytest.fixture
def empty(server, tmp_path, monkeypatch) -> Path:
    """The folder of an empty cache, and a mirror that has nothing yet."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NFNET_WEIGHTS_URL", f"{server.base}/mirror")
    return tmp_path / "home" / "models"


def serve(server, body: bytes, stated: bytes | None = None, path: str = ADDRESS) -> None:
    """Serves a file as the Hugging Face hub does: the checksum on a redirect to the storage."""
    server.answers.clear()
    tag = hashlib.sha256(body if stated is None else stated).hexdigest()
    server.add(path, {"status": 302, "headers": {"Location": "/storage", "X-Linked-Etag": f'"{tag}"'}})
    server.add("/storage", {"body": body})


@pytest.fixture
def hub(server, empty, file):
    serve(server, file)
    return server


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return tmp_path_factory.mktemp("converted") / "models"


@pytest.fixture
def cache(hub, empty, converted) -> Path:
    """The folder of a cache that holds the network; requests are counted from here."""
    if converted.exists():
        shutil.copytree(converted, empty)
    else:
        nfk.create_model(NAME, input_shape=(32, 32, 3))
        shutil.copytree(empty, converted)
    hub.requests.clear()
    return empty


def create(**options):
    return nfk.create_model(NAME, **{"classifier_activation": None, "input_shape": (96, 96, 3), **options})


def images(channels=3) -> np.ndarray:
    return seeded.image((int(GOLDEN["batch"]), *map(int, GOLDEN["hw"]), channels), SEED)


def values(model) -> dict[str, np.ndarray]:
    return {path: variable.numpy() for path, variable in own_variables(model).items()}


def takeable(folder: Path) -> list[str]:
    """What a later call could take for the weights, or for a file that is fetched already."""
    kept = {".lock"}
    return [path.name for path in folder.iterdir() if path.suffix not in kept] if folder.exists() else []


# The numbers.


def test_logits_of_timm(hub, empty):
    model = create()
    assert judge.error(judge.outputs(model, images()), GOLDEN["logits"]) < 2e-5
    assert [path for path, _ in hub.requests] == [ADDRESS, "/storage"]
    (weights,) = empty.glob("*.weights.h5")
    assert weights.name.startswith(f"{NAME}-") and not list(empty.glob("*source*"))
    hub.close()
    again, first = values(create()), values(model)
    assert all(np.array_equal(again[path], first[path]) for path in first)
    assert len(hub.requests) == 2


@files_only
def test_the_authors_pickle(server, empty, monkeypatch):
    """A published network of theirs is too large here: a small one is announced in its place."""
    plain = nfk.create_model("nfnet_tiny", weights=None)
    shapes: dict = {}
    for module, name, variable in nfk.checkpoints.haiku_names(plain):
        shapes.setdefault(module, {})[name] = tuple(variable.shape)
    tree = seeded.fill(shapes, 11)
    body = pickle.dumps(tree)
    entry = dataclasses.replace(
        manifest.published("nfnet_f0"),
        model="nfnet_tiny",
        url="https://storage.googleapis.com/dm-nfnets/tiny_haiku.npz",
        checksum=manifest.Checksum("md5", hashlib.md5(body).hexdigest(), "publisher"),
        parameters=plain.count_params(),
    )
    known = {**manifest._manifest(), "nfnet_tiny": entry}
    monkeypatch.setattr(manifest, "_manifest", lambda: known)
    server.add("/mirror/dm-nfnets/tiny_haiku.npz", {"body": body})
    for _ in range(2):
        model = nfk.NFNetTiny()
        for module, name, variable in nfk.checkpoints.haiku_names(model):
            np.testing.assert_array_equal(variable.numpy(), tree[module][name])
        assert model.metadata["class_names"][0] == "tench"
        assert len(server.requests) == 1
    assert [path.name for path in empty.glob("*.h5")] == [f"nfnet_tiny-{entry.checksum.value[:8]}.weights.h5"]


@files_only
def test_everything_from_one_file(cache, hub):
    whole = values(create())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        headless = create(include_top=False, pooling="avg")
        pyramid = create(features=True)
        odd = create(input_shape=(75, 101, 3))
        grey = create(input_shape=(96, 96, 1))
    for model, fewer in ((headless, 2), (pyramid, 5), (odd, 0)):
        found = values(model)
        assert len(found) == len(whole) - fewer
        assert all(np.array_equal(found[path], whole[path]) for path in found)
    assert np.isfinite(judge.outputs(odd, seeded.image((1, 75, 101, 3), 0))).all()
    logits = judge.outputs(create(), images(1).repeat(3, -1))
    assert judge.error(judge.outputs(grey, images(1)), logits) < 1e-4
    with pytest.warns(UserWarning, match="classifier of 1000 classes, the model 'timm_test_nfnet' one of 7") as said:
        other = create(classes=7)
    assert len(said) == 1 and said[0].filename == __file__
    assert "class_names" not in other.metadata
    assert not hub.requests


# Class names.


@files_only
def test_class_names_stay_with_the_model(cache, tmp_path):
    model = create()
    names = [name for _, name in imagenet_classes()]
    assert model.metadata["class_names"] == names and names[207] == "golden_retriever"
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").metadata == model.metadata
    assert create(weights=tmp_path / "model.keras").metadata["class_names"] == names
    assert "class_names" not in create(include_top=False).metadata


@files_only
def test_predict_names_imagenets_classes(cache, hub, file, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (170, 200, 3), np.uint8)).save(tmp_path / "image.png")
    (tmp_path / "model.safetensors").write_bytes(file)
    told = []
    for weights in (["--weights=" + str(tmp_path / "model.safetensors")], []):
        assert main(["predict", str(tmp_path / "image.png"), f"--model={NAME}", "--json", *weights]) == 0
        told.append(json.loads(capsys.readouterr().out)[0]["predictions"])
    assert len(told[0]) == 5
    for entry in told[0]:
        assert (entry["id"], entry["name"]) == tuple(imagenet_classes()[entry["class"]])
    assert [entry["class"] for entry in told[1]] == [entry["class"] for entry in told[0]]
    assert not hub.requests
    weights = f"--weights={tmp_path / 'model.safetensors'}"
    assert main(["predict", str(tmp_path / "image.png"), f"--model={NAME}", weights, "--top=1"]) == 0
    assert told[0][0]["name"] in capsys.readouterr().out


# What the program computes in does not matter for the file.


@files_only
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_the_file_holds_float32(hub, empty, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = create()
        assert keras.config.dtype_policy().name == policy
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("stem_conv0").dtype_policy.name == policy
    (weights,) = empty.glob("*.weights.h5")
    arrays = open_checkpoint(weights).arrays
    assert {str(stored.dtype) for stored in arrays.values()} == {"float32"}
    np.testing.assert_array_equal(arrays["stem_conv1/1"].read(), filled()["stem.conv2.bias"])
    assert judge.error(judge.outputs(create(), images()), GOLDEN["logits"]) < 2e-5
    assert len(hub.requests) == 2


@files_only
def test_channels_first_does_not_throw_the_file_away(hub, empty):
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="channels last"):
            create()
        assert keras.config.image_data_format() == "channels_first"
    finally:
        keras.config.set_image_data_format("channels_last")
    assert judge.error(judge.outputs(create(), images()), GOLDEN["logits"]) < 2e-5
    assert len(hub.requests) == 2


# What is damaged on the disk.


def cut(data: bytearray) -> bytearray:
    return data[: len(data) // 2]


def superblock(data: bytearray) -> bytearray:
    data[8:60] = bytes(byte ^ 0xFF for byte in data[8:60])
    return data


def a_name(data: bytearray) -> bytearray:
    """A file that opens: only one layer is called otherwise."""
    # In the attribute of the group, which comes before the numbers, and not the name of the group.
    place = data.index(b"stem_conv1")
    while place >= 0:
        data[place + 5] = ord("k")
        place = data.find(b"stem_conv1", place + 1)
    return data


def web_page(data: bytearray) -> bytearray:
    return bytearray(b"<html><body>Please log in</body></html>")


@files_only
@pytest.mark.parametrize("damage", [cut, superblock, a_name, web_page])
def test_a_damaged_cache_is_mended(cache, hub, damage):
    (weights,) = cache.glob("*.weights.h5")
    weights.write_bytes(damage(bytearray(weights.read_bytes())))
    model = create()
    assert [path for path, _ in hub.requests] == [ADDRESS, "/storage"]
    np.testing.assert_array_equal(values(model)["stem_conv1/bias"], filled()["stem.conv2.bias"])
    create()
    assert len(hub.requests) == 2


@files_only
def test_a_damaged_cache_and_no_network(cache, hub):
    (weights,) = cache.glob("*.weights.h5")
    weights.write_bytes(b"")
    hub.close()
    with pytest.raises(OSError, match="passed as `weights`"):
        create()
    assert not list(cache.glob("*.h5"))


# What goes wrong on the way.


@files_only
def test_no_network_and_an_empty_cache(server, empty):
    server.close()
    with pytest.raises(OSError, match=r"by hand and its path passed as `weights`") as caught:
        create()
    assert ADDRESS in str(caught.value)
    assert takeable(empty) == []


@files_only
def test_wrong_bytes(hub, empty, file):
    damaged = file[:-1] + bytes([file[-1] ^ 1])
    serve(hub, damaged, stated=file)
    with pytest.raises(OSError, match="checksum"):
        create()
    assert takeable(empty) == []
    serve(hub, file)
    assert judge.error(judge.outputs(create(), images()), GOLDEN["logits"]) < 2e-5


def another_network() -> bytes:
    arrays = filled()
    arrays["stages.0.1.conv1.weight"] = arrays["stages.0.0.conv1.weight"]
    return safetensors.numpy.save(arrays)


def no_numbers() -> bytes:
    arrays = filled()
    arrays["final_conv.bias"][3] = np.nan
    return safetensors.numpy.save(arrays)


@files_only
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (another_network, r"has the parameter 'stages\.0\.1\.conv1\.weight', which the model has not"),
        (no_numbers, r"'final_conv\.bias' is not finite \(1 NaN"),
    ],
)
def test_a_file_that_is_whole_and_wrong(hub, empty, file, body, message):
    serve(hub, body())
    with pytest.raises(CheckpointError, match=message):
        create()
    assert takeable(empty) == []
    serve(hub, file)
    assert judge.error(judge.outputs(create(), images()), GOLDEN["logits"]) < 2e-5
    assert len(hub.requests) == 4


# Several processes.

CHILD = """
import sys
import nfnet_keras as nfk
sys.stdin.readline()
model = nfk.create_model("timm_test_nfnet", input_shape=(32, 32, 3))
print(float(model.get_layer("stem_conv1").bias[0]))
"""


@files_only
@pytest.mark.slow
def test_two_processes_fetch_once(hub, empty):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", CHILD], env=environment, **pipes) for _ in range(2)]
    told = [child.communicate("go\n", timeout=250) for child in children]
    assert [child.returncode for child in children] == [0, 0], told
    assert [float(out.splitlines()[-1]) for out, _ in told] == [float(filled()["stem.conv2.bias"][0])] * 2
    assert [path for path, _ in hub.requests] == [ADDRESS, "/storage"]


@files_only
@pytest.mark.slow
def test_killed_while_it_loads(hub, empty):
    """Whatever is left behind, the next call ends well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import os, signal\nfrom nfnet_keras.applications import weights\n"
        "weights.save_checkpoint = lambda model, path, format: "
        "(open(path, 'wb').write(b'half'), os.kill(os.getpid(), signal.SIGKILL))\n"
        "import nfnet_keras as nfk\nnfk.create_model('timm_test_nfnet')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=250)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not [path for path in empty.glob("*.weights.h5") if ".unfinished." not in path.name]
    assert judge.error(judge.outputs(create(), images()), GOLDEN["logits"]) < 2e-5
    # The source was whole.
    assert len(hub.requests) == 2


# Memory.

MAKE = """
import pickle, sys
sys.path.insert(0, golden)
import judge, seeded
tree = seeded.fill(judge.tree("haiku", "NFNet-F2"), 0)
with open(path, "wb") as file:
    pickle.dump(tree, file, protocol=4)
report(sum(array.nbytes for arrays in tree.values() for array in arrays.values()))
"""
LOAD = """
import resource
import nfnet_keras as nfk
nfk.create_model("nfnet_tiny", weights=None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = nfk.NFNetF2(weights=path, input_shape=(64, 64, 3))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bias = float(keras.ops.convert_to_numpy(model.get_layer("stem_conv1").bias)[0])
report({"grown": 1024 * (after - before), "bias": bias})
"""


@files_only
@pytest.mark.slow
def test_memory(new_process, tmp_path):
    """Loading takes the model and little more: not the file too."""
    path = str(tmp_path / "F2_haiku.npz")
    try:
        size = new_process("import keras\n" + MAKE, path=path, golden=str(ROOT / "tests" / "golden"))
        told = new_process("import keras\n" + LOAD, path=path)
    finally:
        Path(path).unlink(missing_ok=True)
    assert size > 7e8
    assert told["bias"] == float(seeded.array("NFNet/~/stem_conv1", "bias", (32,), 0)[0])
    assert told["grown"] < 2.5 * size, told["grown"] / size
