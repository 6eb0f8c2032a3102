"""What the package shows of itself."""

import re
from pathlib import Path

import keras
import pytest

import nfnet_keras as nfk

ROOT = Path(__file__).parents[1]


def test_public_names_are_there():
    for name in nfk.__all__:
        assert hasattr(nfk, name), name
    for module in (nfk.layers, nfk.optimizers, nfk.applications, nfk.checkpoints):
        for name in module.__all__:
            assert hasattr(module, name), name


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", nfk.__version__)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow is the backend")
def test_other_backends_do_not_import_tensorflow(new_process):
    imported = new_process("import sys, nfnet_keras\nreport('tensorflow' in sys.modules)")
    keras_alone = new_process("import sys, keras\nreport('tensorflow' in sys.modules)")
    assert imported == keras_alone


def test_layers_and_optimizers_do_not_import_what_lies_above():
    """The rule of direction: layers and optimizers, then model, then applications, then training, then cli."""
    above = {
        "layers": "model|applications|training|cli|data|checkpoints|optimizers",
        "optimizers": "model|applications|training|cli|data|checkpoints|layers",
        "checkpoints": "applications|training|cli|data|optimizers",
        "applications": "training|cli",
    }
    for folder, names in above.items():
        for path in (ROOT / "nfnet_keras" / folder).glob("*.py"):
            wrong = re.findall(rf"^\s*(?:from|import) nfnet_keras\.(?:{names})\b.*", path.read_text(), re.MULTILINE)
            assert not wrong, f"{path.name}: {wrong}"


def test_everything_public_has_a_docstring():
    for module in (nfk, nfk.layers, nfk.optimizers, nfk.checkpoints, nfk.applications):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                assert thing.__doc__ and len(thing.__doc__) > 80, name


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="an extra is installed beside TensorFlow")
@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ("", "nfk.Predictor(model)(images)\nnfk.export(model, 'a')\nnfk.export(model, 'a.tflite')"),
        ("openvino", "assert nfk.Predictor(model).engine == 'openvino'\nnfk.export(model, 'a.xml')"),
        pytest.param(
            "export",
            "for ending in ('onnx', 'tflite', 'xml'): nfk.export(model, f'a.{ending}')",
            marks=pytest.mark.slow,
        ),
        ("tfds", "import tensorflow_datasets\ntensorflow_datasets.load"),
    ],
)
def test_extras_bring_what_they_are_for(extra, use, new_process):
    code = """
import sys
sys.path.insert(0, root)
from benchmarks.sides import as_installed
as_installed(*extras)
import nfnet_keras as nfk
model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=2)
images = np.zeros((1, 32, 32, 3), "float32")
"""
    code += f"{use}\nreport('done')\n"
    assert new_process(code, root=str(ROOT), extras=[extra] if extra else []) == "done"
