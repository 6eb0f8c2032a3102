"""The notebooks: what is committed of them is whole and clean, and they run to the end without a network."""

import base64
import json
import os
import re
import struct
from pathlib import Path

import keras
import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = ("signal_propagation", "tpu_and_multi_gpu", "train_with_agc", "transfer_learning")
REPOSITORY = "nfnet-keras/nfnet-keras"
MOST_BYTES = 200_000
# Paths of a machine, and what programs say of themselves rather than of the subject.
UNWANTED = (
    r"(?<![\w.])/(?:work|tmp|home|root|usr|opt|content)/|[A-Z]:\\\\|Traceback|Warning|WARNING|INFO:|^[IWE]\d{4} |\x1b\["
)

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the notebooks are TensorFlow's")


def read(name: str):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook) -> list[str]:
    """All that the outputs say."""
    found = []
    for output in (output for cell in code(notebook) for output in cell.outputs):
        found += [output.text] if output.output_type == "stream" else [output.get("data", {}).get("text/plain", "")]
    return found


def test_all_are_known():
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed(name):
    path = EXAMPLES / f"{name}.ipynb"
    notebook = read(name)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    target = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/examples/{name}.ipynb"
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert f"(https://colab.research.google.com/assets/colab-badge.svg)]({target})" in first.source
    # Nothing is installed where the package is there.
    install = code(notebook)[0].source
    assert re.search(r'find_spec\("nfnet_keras"\) is None:\n(    .*\n)*    %pip install -q \{source\}', install)
    assert '"nfnet-keras"' in install
    assert sum("%pip" in cell.source for cell in code(notebook)) == 1
    assert sum("NFK_QUICK" in cell.source for cell in code(notebook)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_of_a_whole_run(name):
    notebook = read(name)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)
    assert not any("execution" in cell.metadata for cell in cells), "times of execution change with every run"
    for text in [*texts(notebook), *(cell.source for cell in notebook.cells)]:
        assert not re.search(UNWANTED, text, re.MULTILINE), text
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    for picture in pictures:
        header = base64.b64decode(picture)[:24]
        assert header.startswith(b"\x89PNG") and max(struct.unpack(">II", header[16:24])) < 1200
    assert pictures or name == "tpu_and_multi_gpu"


def test_what_the_outputs_show():
    """The figures that the text of the notebooks builds on."""
    transfer = "\n".join(texts(read("transfer_learning")))
    assert "Going on with the small weights that come with this package" in transfer
    assert float(re.search(r"fine-tuned: +([\d.]+) %", transfer)[1]) > 90
    assert float(re.search(r"agc_clipped of the first .*\[([\d.]+), ", transfer)[1]) > 0
    agc = "\n".join(texts(read("train_with_agc")))
    for rate in (0.1, 0.3):
        assert re.search(rf"learning rate {rate}\s+without AGC\s+loss\s+nan\s+10.0 % right", agc)
        assert float(re.search(rf"learning rate {rate}\s+with AGC\s+loss.* ([\d.]+) % right", agc)[1]) > 80
    devices = "\n".join(texts(read("tpu_and_multi_gpu")))
    assert [float(value) < 1e-3 for value in re.findall(r"from one device's: (\S+)", devices)] == [True, True]
    assert "2 devices, DataParallel" in devices and "2 devices, MirroredStrategy" in devices
    signals = "\n".join(texts(read("signal_propagation")))
    variances = re.findall(r"variance (\S+) behind the first block, (\S+) behind the last", signals)
    assert [float(last) / float(first) > 1000 for first, last in variances] == [False, True]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
    """Every cell, with the small setting, in an empty folder, without a network."""
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("NFK_QUICK", "1")
    # Nothing listens there: whatever asks for the network fails at once.
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in (
        "no_proxy",
        "NO_PROXY",
        "NFNET_WEIGHTS_URL",
        "KERAS_BACKEND",
        "XLA_FLAGS",
        "TF_CONFIG",
        "MPLBACKEND",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    notebook = read(name)
    sources = [cell.source for cell in notebook.cells]
    for cell in code(notebook):
        cell.outputs = []
    runner = client.NotebookClient(
        notebook, timeout=550, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    runner.execute()
    assert [cell.source for cell in notebook.cells] == sources
    assert all(cell.execution_count for cell in code(notebook))
    if name == "transfer_learning":
        assert "cannot be fetched here" in "\n".join(texts(notebook))
        assert (tmp_path / "my_model.keras").is_file()
    assert not list((tmp_path / "keras").rglob("*.weights.h5"))
    json.dumps(notebook)
