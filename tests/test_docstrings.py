"""Every example in a docstring runs and gives what it says."""

import doctest
import importlib
import pkgutil

import keras
import pytest

import nfnet_keras

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(nfnet_keras.__path__, "nfnet_keras.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"keras": keras}, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0
