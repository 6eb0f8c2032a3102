"""Converted weights on disk: one download for all processes, and nothing half done is ever used."""

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nfnet_keras.checkpoints import cache, manifest
from nfnet_keras.checkpoints.cache import cached, forget, weights_folder
from nfnet_keras.checkpoints.download import DownloadError

ROOT = Path(__file__).parents[2]
AUTHORS, TIMM = "nfnet_f0", "timm_eca_nfnet_l0"
NAME = f"{AUTHORS}-0a41039d"

# The program runs without the package's own __init__, which imports Keras: seconds for each process.
CHILD = f"""
import os, sys, types
for name in ("nfnet_keras", "nfnet_keras.checkpoints"):
    package = types.ModuleType(name)
    package.__path__ = [os.path.join({str(ROOT)!r}, *name.split("."))]
    sys.modules[name] = package
from nfnet_keras.checkpoints import cache
assert not {{"keras", "tensorflow", "numpy", "h5py"}} & set(sys.modules)
cache._PATIENCE = 0.05
def convert(source, path):
    with open(source, "rb") as old, open(path, "wb") as new:
        new.write(b"converted " + old.read(10))
        if sys.argv[2:] == ["die"]:
            new.flush()
            os.kill(os.getpid(), 9)
print(cache.cached(sys.argv[1], convert))
"""


def convert(source, path):
    assert path.endswith(".weights.h5")
    Path(path).write_bytes(b"converted " + Path(source).read_bytes()[:10])


@pytest.fixture
def folder(tmp_path, monkeypatch, server, body) -> Path:
    """An empty home for Keras, a mirror that has nothing yet, and the MD5 of the test's file as that of NFNet-F0."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NFNET_WEIGHTS_URL", f"{server.base}/mirror/")
    return tmp_path / "home" / "models"


@pytest.fixture
def hub(server, folder, body, sha256) -> str:
    """Serves timm's file as the Hugging Face hub does; returns its path."""
    path = "/mirror/timm/eca_nfnet_l0.ra2_in1k/resolve/main/model.safetensors"
    server.add(path, {"status": 302, "headers": {"Location": "/storage", "X-Linked-Etag": f'"{sha256}"'}})
    return path


def child(*args, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *args],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for(process, condition):
    end = time.monotonic() + 15
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def weights_in(folder) -> list[str]:
    """What could be taken for a model's weights."""
    return [path.name for path in folder.glob("*.h5") if not path.name.endswith(".unfinished.weights.h5")]


def test_folder_is_read_at_each_call(monkeypatch):
    monkeypatch.setenv("KERAS_HOME", "/some/home")
    assert weights_folder() == "/some/home/models"
    monkeypatch.setenv("KERAS_HOME", "~/other")
    assert weights_folder() == os.path.expanduser("~/other/models")
    for unset in ("", None):
        monkeypatch.setenv("KERAS_HOME", "") if unset == "" else monkeypatch.delenv("KERAS_HOME")
        assert weights_folder() == os.path.expanduser("~/.keras/models")


def test_fetched_and_converted_once(server, folder, hub, body, sha256):
    server.add("/storage", {"body": body})
    path = Path(cached(TIMM, convert, progress=False))
    tag = hashlib.sha256(manifest.published(TIMM).url.encode()).hexdigest()[:8]
    assert path == folder / f"{TIMM}-{tag}.weights.h5"
    assert path.read_bytes() == b"converted " + body[:10]
    assert [p for p, _ in server.requests] == [hub, "/storage"]
    record = json.loads((folder / f"{TIMM}-{tag}.json").read_text())
    assert record["url"] == server.base + hub
    assert (record["algorithm"], record["checksum"], record["checksum_source"]) == ("sha256", sha256, "server")
    assert record["size"] == len(body)
    assert record["model"] == TIMM
    assert {"date", "nfnet_keras"} <= set(record)
    assert {p.suffix for p in folder.iterdir()} <= {".h5", ".json", ".lock"}
    server.close()
    assert cached(TIMM, None) == str(path)


def test_published_checksum_names_the_file(server, folder, body, monkeypatch):
    server.add("/mirror/dm-nfnets/F0_haiku.npz", {"body": body})
    with pytest.raises(DownloadError, match=r"wrong checksum.*0a41039da1cb43adf47f1b7d86ddfe0f"):
        cached(AUTHORS, convert, progress=False)
    assert weights_in(folder) == []
    md5 = hashlib.md5(body).hexdigest()
    monkeypatch.setattr(cache, "published", lambda name: _with_md5(manifest.published(name), md5))
    assert cached(AUTHORS, convert, progress=False) == str(folder / f"{AUTHORS}-{md5[:8]}.weights.h5")


def _with_md5(weights, md5):
    return dataclasses.replace(weights, checksum=manifest.Checksum("md5", md5, "publisher"))


def test_unknown_model(folder):
    with pytest.raises(ValueError, match=r"No weights are published for 'nfnet_f7'.*nfnet_f0"):
        cached("nfnet_f7", convert)
    assert not folder.exists()


def test_offline_without_a_file(server, folder):
    server.close()
    with pytest.raises(DownloadError, match=r"cannot be reached.*passed as `weights`"):
        cached(TIMM, convert, progress=False)


def test_folder_that_cannot_be_made(server, folder, hub):
    folder.parent.write_text("not a folder")
    with pytest.raises(DownloadError, match="name another in KERAS_HOME"):
        cached(TIMM, convert, progress=False)
    assert server.requests == []


def test_forget(server, folder, hub, body):
    server.add("/storage", {"body": body})
    forget(TIMM)
    path = Path(cached(TIMM, convert, progress=False))
    forget(TIMM)
    assert weights_in(folder) == []
    assert not list(folder.glob("*.json"))
    assert cached(TIMM, convert, progress=False) == str(path)
    assert len(server.requests) == 4


def test_unreadable_source_is_not_kept(server, folder, hub, body):
    server.add("/storage", {"body": body})

    def fail(source, path):
        Path(path).write_bytes(b"half")
        raise ValueError("no such tensor")

    with pytest.raises(ValueError, match="no such tensor"):
        cached(TIMM, fail, progress=False)
    assert {path.suffix for path in folder.iterdir()} <= {".lock"}
    cached(TIMM, convert, progress=False)
    assert len(server.requests) == 4


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_source_is_used_again_if_it_is_not_to_blame(server, folder, hub, body, error):
    server.add("/storage", {"body": body})

    def fail(source, path):
        Path(path).write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        cached(TIMM, fail, progress=False)
    assert weights_in(folder) == []
    assert Path(cached(TIMM, convert, progress=False)).read_bytes() == b"converted " + body[:10]
    assert len(server.requests) == 2
    assert not list(folder.glob("*.source*"))


@pytest.mark.parametrize("damage", ["source", "record"])
def test_damaged_left_over_is_fetched_anew(server, folder, hub, body, damage):
    server.add("/storage", {"body": body})

    def stop(source, path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(TIMM, stop, progress=False)
    next(folder.glob("*.source.*" if damage == "source" else "*.json")).write_bytes(b"damaged")
    assert Path(cached(TIMM, convert, progress=False)).read_bytes() == b"converted " + body[:10]
    assert len(server.requests) == 4


def test_two_processes(server, folder, hub, body):
    server.add("/storage", {"body": body, "cut": 1000, "hold": server.released, "rest": True})
    first = child(TIMM)
    wait_for(first, lambda: len(server.requests) == 2)
    second = child(TIMM)
    said = second.stderr.readline()
    assert said == f"waiting for another process that fetches the weights of {TIMM}\n"
    assert second.poll() is None
    server.released.set()
    outputs = [process.communicate(timeout=20) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert Path(outputs[0][0].strip()).read_bytes() == b"converted " + body[:10]
    assert "downloading model.safetensors, 205 kB\n" in outputs[0][1]
    assert outputs[1][1] == ""
    assert [path for path, _ in server.requests] == [hub, "/storage"]


def test_killed_while_downloading(server, folder, hub, body):
    tag = '"first"'
    server.add("/storage", {"body": body, "etag": tag, "cut": 100_000, "hold": server.released})
    process = child(TIMM)
    wait_for(process, lambda: sum(path.stat().st_size for path in folder.glob("*.part")) == 100_000)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert weights_in(folder) == []
    server.answers["/storage"][0].cut = server.answers["/storage"][0].hold = None
    assert Path(cached(TIMM, convert, progress=False)).read_bytes() == b"converted " + body[:10]
    assert server.ranges() == [None, None, "bytes=100000-", "bytes=100000-"]
    assert not list(folder.glob("*.part*"))


def test_killed_while_converting(server, folder, hub, body):
    server.add("/storage", {"body": body})
    process = child(TIMM, "die")
    output = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL, output
    assert list(folder.glob("*.unfinished.weights.h5"))
    assert weights_in(folder) == []
    assert Path(cached(TIMM, convert, progress=False)).read_bytes() == b"converted " + body[:10]
    assert len(server.requests) == 2
    assert not list(folder.glob("*.unfinished*"))
