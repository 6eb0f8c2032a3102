"""A checkpoint's content tells what it is; what is none is named, with what to do about it."""

import errno
import pickle
import zipfile

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file

from nfnet_keras.checkpoints.formats import open_checkpoint
from nfnet_keras.checkpoints.stored import CheckpointError

ARRAY = np.arange(3, dtype=np.float32)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5", ".keras", ""])
@pytest.mark.parametrize("kind", ["haiku", "timm", "keras", "keras archive"])
def test_told_apart_by_content(tmp_path, kind, suffix):
    path = tmp_path / f"x{suffix}"
    if kind == "haiku":
        path.write_bytes(pickle.dumps({"m": {"w": ARRAY}}))
    elif kind == "timm":
        save_file({"w": ARRAY}, path)
    else:
        model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3, name="head")])
        written = tmp_path / ("y.keras" if "archive" in kind else "y.weights.h5")
        model.save(written) if "archive" in kind else model.save_weights(written)
        written.rename(path)
    for given in (path, str(path), bytes(path)):
        checkpoint = open_checkpoint(given)
        assert checkpoint.format == kind.split()[0] and checkpoint.path == str(path)
        assert all(stored.read().shape == stored.shape for stored in checkpoint.arrays.values())


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x0580])
def test_a_header_length_that_looks_like_a_pickle(tmp_path, length):
    name = "w" * (length - 54)
    save_file({name: ARRAY}, tmp_path / "x")
    assert (tmp_path / "x").read_bytes()[:2] == length.to_bytes(2, "little")
    assert open_checkpoint(tmp_path / "x").format == "timm"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; fetch it again"),
        (b"\n  <!DOCTYPE html><html>", "is a web page, not a checkpoint: the download went wrong"),
        (b"<?xml version='1.0'?><Error>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer.*git lfs pull"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "old PyTorch file; .*safetensors"),
        (b"\x93NUMPY\x01", "single NumPy array; a checkpoint is one of"),
        (b"\x1f\x8b123", "gzip"),
        (b'{"weight_map": {}}', "JSON"),
        (b"cos\nsystem\n(S'true'\ntR.", r"names os\.system"),
        (b"(ios\nsystem\n.", r"names os\.system"),
        (b"(dp0\nS'm'\np1\n.", "operation DICT"),
        (b"hello world.", "no checkpoint that this package knows"),
        (b"PK\x03\x04 and no more", "damaged or cut short zip"),
        (b"\x89HDF\r\n\x1a\n and no more", "no HDF5 file as Keras"),
        (b"\x89HDF\r\n\x1a\n", "no HDF5 file as Keras"),
        (b"\x80", "cut short"),
        (b"\x20\0\0\0\0\0\0\0{", "safetensors"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "F0_haiku.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["archive/data.pkl", "archive/data/0"], "PyTorch file.*safetensors"),
        (["a.npy", "b.npy"], r"NumPy \.npz archive; .*pickles"),
        (["config.json", "model.weights.json"], "several files; save it with"),
        (["x"], "zip archive without"),
    ],
)
def test_other_archives_are_named(tmp_path, names, message):
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.keras")


def test_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint file; check the path.*missing"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(IsADirectoryError, match="give the file in it"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.keras").write_bytes(b"")
    with pytest.raises(IsADirectoryError, match=r"give model\.keras in it"):
        open_checkpoint(tmp_path)

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(PermissionError, match=r"may not read the checkpoint file.*locked"):
        open_checkpoint(tmp_path / "locked")
