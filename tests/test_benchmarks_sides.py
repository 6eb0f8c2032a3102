"""The sides of the benchmarks: what runs in a peer's environment, and what ours sees of its own."""

import gzip
import importlib.metadata
import json
import pathlib
import sys
import types

import numpy as np
import pytest

import benchmarks
from benchmarks.sides import as_installed, authors_side, kecam_side, need_device, not_installed

GOLDEN = pathlib.Path(__file__).parent / "golden"
BENCHMARKS = pathlib.Path(benchmarks.__file__).parent


def trees():
    read = [json.loads(gzip.decompress((GOLDEN / f"{kind}_trees.json.gz").read_bytes())) for kind in ("timm", "haiku")]
    return read[0], read[1]


def test_every_parameter_of_timm_has_its_place_in_the_authors_tree():
    timm, haiku = trees()
    names = [f"{module}.{name}".lstrip(".") for module, values in timm["dm_nfnet_f0"].items() for name in values]
    found = [authors_side.haiku_name(name, [1, 2, 6, 3]) for name in names]
    assert sorted(found) == sorted((module, name) for module, values in haiku["NFNet-F0"].items() for name in values)


def test_parameters_of_timm_have_different_places_in_kecams_network():
    timm, _ = trees()
    for network, depth in (("dm_nfnet_f0", "stack3_block6_deep_4_conv"), ("eca_nfnet_l0", "stack1_block1_eca_conv1d")):
        names = [f"{module}.{name}".lstrip(".") for module, values in timm[network].items() for name in values]
        places = [kecam_side.layer_and_variable(name) for name in names]
        assert len(set(places)) == len(places)
        assert (depth, "kernel") in places and ("predictions", "bias") in places


def test_timms_kernels_are_turned_for_tensorflow():
    kernel = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    for turn in (kecam_side._from_timm, authors_side._from_timm):
        assert turn(kernel, (5, 7, 3, 2))[4, 6, 2, 1] == kernel[1, 2, 4, 6]
        assert turn(kernel[:, :, :1, :1], (3, 2))[2, 1] == kernel[1, 2, 0, 0]
        assert turn(np.ones((4, 1, 1, 1)), (4,)).shape == (4,)


def test_a_side_without_the_gpu_that_is_asked_for_says_so(monkeypatch):
    need_device("cpu", "no such library")
    libraries = {
        "jax": types.SimpleNamespace(default_backend=lambda: "cpu"),
        "torch": types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False)),
        "tensorflow": types.SimpleNamespace(config=types.SimpleNamespace(list_physical_devices=lambda kind: [])),
    }
    for name, module in libraries.items():
        monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(RuntimeError, match=f"{name} finds no GPU"):
            need_device("gpu", name)
    libraries["jax"].default_backend = lambda: "gpu"
    need_device("gpu", "jax")


def test_for_a_gpu_nothing_is_hidden(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    monkeypatch.setenv("NFNET_BENCHMARK_DEVICE", "gpu")
    as_installed("openvino")
    assert sys.meta_path == before


def test_our_sides_import_what_an_installation_has(new_process):
    code = """
import sys
sys.path.insert(0, root)
from benchmarks.sides import as_installed
as_installed("openvino")
import nfnet_keras
import openvino
report([name in sys.modules for name in ("tensorflow", "jax", "sklearn", "torch")])
"""
    env = {"KERAS_BACKEND": "tensorflow"}
    assert new_process(code, env=env, root=str(BENCHMARKS.parent)) == [True, False, False, False]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_sides_have_all_that_their_backend_needs(backend, new_process):
    code = """
import sys
sys.path.insert(0, root)
from benchmarks.sides import as_installed
as_installed("openvino")
import keras
report([float(keras.ops.sum(keras.ops.ones((2, 3)))), "sklearn" in sys.modules])
"""
    assert new_process(code, env={"KERAS_BACKEND": backend}, root=str(BENCHMARKS.parent)) == [6.0, False]


def test_what_a_plain_installation_does_not_bring(monkeypatch):
    owners = {"a": ["A_b"], "c": ["c.d"], "e": ["e"], "f": ["f", "c-d"], "g": ["g"]}
    requires = {"a-b": ["C.d>=2 ; python_version > '3'", "E ; extra == 'more'"], "c-d": None}

    def find(name):
        if name in requires:
            return requires[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    monkeypatch.setattr(importlib.metadata, "requires", find)
    assert not_installed("a-B") == {"e", "g"}
    assert not_installed("a-B", "other", "more") == {"g"}
