"""Every example in a docstring runs and gives what it says, and every public name has one."""

import ast
import doctest
import importlib
import inspect
import pkgutil

import keras
import pytest

import nfnet_keras as nfk
from nfnet_keras.complexity import without_weights

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(nfk.__path__, "nfnet_keras.")
    if not module.name.endswith("__main__")
)
PACKAGES = ["nfnet_keras", *(name for name in MODULES if hasattr(importlib.import_module(name), "__all__"))]
CONSTRUCTORS = {name: nfk.applications.get_constructor(name) for name in nfk.list_models()}
TITLES = {constructor.__name__ for constructor in CONSTRUCTORS.values()}
FLAGS = doctest.IGNORE_EXCEPTION_DETAIL


def examples_in_source(module) -> set[str]:
    """The names under which doctest should file what has an example, read from the source."""
    found = set()

    def walk(node, name):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ">>>" in (ast.get_docstring(node) or ""):
            found.add(name)
        for child in ast.iter_child_nodes(node):
            walk(child, f"{name}.{child.name}" if isinstance(child, kinds) else name)

    walk(ast.parse(inspect.getsource(module)), module.__name__)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder().find(module, extraglobs={"keras": keras})
    # The constructors' examples are one text, and some build gigabytes: see below.
    tests = [test for test in tests if test.name.rpartition(".")[2] not in TITLES]
    assert {test.name for test in tests if test.examples} == examples_in_source(module), "an example is not run"
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def public_objects():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{package}.{name}", thing


def test_every_public_name_has_an_example():
    assert len(list(public_objects())) > 100
    assert [name for name, thing in public_objects() if ">>> " not in (thing.__doc__ or "")] == []


def test_no_example_is_out_of_reach_of_doctest():
    """Neither fenced, which doctest does not look for, nor in the help of a module that is run as a program."""
    for name in [*MODULES, "nfnet_keras.__main__"]:
        module = importlib.import_module(name) if name in MODULES else None
        source = inspect.getsource(module) if module else (importlib.resources.files(nfk) / "__main__.py").read_text()
        assert "```" not in source, name
    assert ">>>" not in source


def run_examples(thing) -> int:
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    [test] = doctest.DocTestFinder().find(thing, thing.__name__, globs={})
    with without_weights():
        return runner.run(test).failed


@pytest.mark.parametrize(
    "name",
    [
        "nfnet_tiny",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("nfnet_f7_plus", "nf_regnet_b0", "nf_resnet50", "timm_nfnet_l0", "timm_nf_regnet_b0")
        ),
    ],
)
def test_examples_of_constructors(name):
    assert run_examples(CONSTRUCTORS[name]) == 0


def test_examples_of_constructors_are_of_one_kind():
    """So that those of a few prove all."""

    def example(name):
        constructor = CONSTRUCTORS[name]
        assert constructor.__name__ == name or getattr(nfk, constructor.__name__) is constructor
        named = f'create_model("{name}", ' if constructor.__name__ == name else f"{constructor.__name__}("
        return constructor.__doc__.partition("Example:")[2].replace(named, "(", 1)

    assert ">>> model = nfk.(weights=None" in example("nfnet_tiny")
    assert {example(name) for name in CONSTRUCTORS} == {example("nfnet_tiny")}
