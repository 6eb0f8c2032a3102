"""The command line: help, versions, and what is said when something is wrong."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nfnet_keras.cli.main import main
from nfnet_keras.version import __version__


def images(folder, classes=("cat", "dog"), each=3):
    """Makes a folder of class folders of small pictures."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def failure(capsys, *arguments):
    """Runs a command that must fail and returns the one line that it says."""
    status = main(arguments)
    printed = capsys.readouterr()
    assert status != 0
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err
    return lines[0]


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in (
        "model",
        "data",
        "epochs",
        "batch-size",
        "image-size",
        "learning-rate",
        "clip-factor",
        "seed",
        "out",
        "resume",
    ):
        assert f"--{flag}\n" in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nfnet {__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "no command 'trian'"),
        (["train", "--epocs=3"], "epochs"),
        (["train", "--epochs=many"], "many"),
        (["train", "--batch-size=0"], "batch_size"),
        (["train", "--learning_rate=-1"], "learning_rate"),
        (["train", "stray"], "stray"),
        (["train", "--model=nfnet_f00"], "nfnet_f0"),
        (["train", "--data=no/such/folder"], "no/such/folder"),
        (["train", "--resume"], "--out"),
        (["train", "--resume", "--out=no/such/run"], "no run to resume"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, arguments, words):
    assert words in failure(capsys, *arguments)


def test_an_image_size_below_the_networks_is_refused(capsys, tmp_path):
    assert "32 x 32" in failure(capsys, "train", "--image-size=16", f"--out={tmp_path / 'run'}")


def test_a_folder_without_images(capsys, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    assert "no images" in failure(capsys, "train", f"--data={tmp_path}", f"--out={tmp_path / 'run'}")


def test_a_folder_with_one_class(capsys, tmp_path):
    folder = images(tmp_path / "pictures", classes=("cat",))
    assert "only one class" in failure(capsys, "train", f"--data={folder}", f"--out={tmp_path / 'run'}")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>no image</html>"])
def test_a_broken_image_is_named(capsys, tmp_path, damage):
    folder = images(tmp_path / "pictures")
    broken = folder / "dog" / "1.png"
    broken.write_bytes(damage(broken.read_bytes()))
    line = failure(capsys, "train", f"--data={folder}", f"--out={tmp_path / 'run'}")
    assert str(broken) in line
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot write to" in failure(capsys, "train", f"--out={file / 'run'}")


def test_training_on_a_folder_and_refusals_afterwards(capsys, tmp_path):
    folder, out = images(tmp_path / "pictures", each=5), tmp_path / "run"
    arguments = ["train", f"--data={folder}", f"--out={out}", "--epochs=1", "--batch-size=4", "--image-size=32"]
    arguments.append("--learning-rate=0.05")
    assert main(arguments) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "Test accuracy" in last
    assert str(out) in last
    assert {"model.keras", "metrics.json", "metrics.csv", "curves.png"} <= set(os.listdir(out))
    assert "--resume" in failure(capsys, *arguments)
    assert "seed 0, not 3" in failure(capsys, "train", "--resume", f"--out={out}", "--seed=3")
    assert "learning_rate 0.05, not 0.1" in failure(capsys, "train", "--resume", f"--out={out}", "--learning-rate=0.1")
    same = ["--batch-size=4", "--learning-rate=0.05", f"--data={folder}", "--epochs=1", "--seed=0"]
    assert main(["train", "--resume", f"--out={out}", *same]) == 0
    capsys.readouterr()
    assert "batch_size 4, not 8" in failure(capsys, "train", "--resume", f"--out={out}", "--batch-size=8")


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_the_checkpoint_whole(tmp_path):
    # A limit on the size of a file does to the second checkpoint what a full disk does.
    code = (
        "import resource, sys\n"
        "from nfnet_keras.training import recorder, run_folder\n"
        "save = run_folder.RunFolder.save_checkpoint\n"
        "def once(self, model, state):\n"
        "    save(self, model, state)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "run_folder.RunFolder.save_checkpoint = once\n"
        "from nfnet_keras.cli.main import main\n"
        f"status = main(['train', '--epochs=2', '--batch-size=256', '--out={tmp_path / 'run'}'])\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "cannot write to" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-000000005.keras"]
    assert [name for name in os.listdir(tmp_path / "run") if name.startswith(".")] == []
    resumed = ["-m", "nfnet_keras", "train", "--resume", f"--out={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *resumed], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Test accuracy" in done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_from_outside_keeps_what_was_learnt(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "nfnet_keras", "train", "--epochs=3", "--batch-size=256", f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "Epoch 2/3" in line:
            break
    process.send_signal(2)
    rest, errors = process.communicate(timeout=200)
    assert process.returncode == 130, rest + errors
    assert "Traceback" not in errors
    assert "--resume" in errors.strip().splitlines()[-1]
    assert list((out / "checkpoints").glob("step-*.keras"))
    done = subprocess.run(
        [*command[:4], "train", "--resume", f"--out={out}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (out / "metrics.json").exists()


def test_numbers_of_errors_are_left_out():
    from nfnet_keras.cli.main import _one_line

    assert _one_line(FileNotFoundError(2, "there is no such file", "a.npz")) == "there is no such file: 'a.npz'"


def test_a_backend_that_is_not_installed_is_said_in_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("raise ModuleNotFoundError('there is none', name='jax')")
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"KERAS_BACKEND": "jax", "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    command = [sys.executable, "-m", "nfnet_keras", "list"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert 'pip install "nfnet-keras[jax]"' in done.stderr


@pytest.mark.parametrize("chosen", [None, "0"])
def test_tensorflow_runs_with_onednn_unless_the_user_says_otherwise(chosen, new_process):
    code = """
import sys
sys.argv = ["nfnet"]
import nfnet_keras
from nfnet_keras.tensorflow_convolution import uses_onednn
report(uses_onednn())
"""
    # None takes away what this process was started with.
    found = new_process(code, env={"TF_ENABLE_ONEDNN_OPTS": chosen, "KERAS_BACKEND": "tensorflow"})
    assert found == (chosen is None and platform.machine() in ("x86_64", "AMD64"))
