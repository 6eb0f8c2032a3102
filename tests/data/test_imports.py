import subprocess
import sys
from types import SimpleNamespace

import pytest
import tensorflow as tf

import nfnet_keras.data
from nfnet_keras.data._tensorflow import tensorflow


def test_importing_the_room_imports_no_tensorflow():
    # The parent package is stood in for, so that only this room is judged.
    folder = nfnet_keras.data.__path__[0]
    code = (
        "import sys, types, os\n"
        "parent = types.ModuleType('nfnet_keras')\n"
        f"parent.__path__ = [os.path.dirname({folder!r})]\n"
        "sys.modules['nfnet_keras'] = parent\n"
        "import nfnet_keras.data\n"
        "print([m for m in ('tensorflow', 'keras') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_exists():
    assert all(hasattr(nfnet_keras.data, name) for name in nfnet_keras.data.__all__)


@pytest.mark.parametrize(("backend", "calls"), [("tensorflow", []), ("jax", [[]]), ("torch", [[]])])
def test_gpus_are_left_to_the_backend(monkeypatch, backend, calls):
    hidden = []
    config = SimpleNamespace(backend=lambda: backend)
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(config=config))
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["a GPU"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: hidden.append(devices))
    assert tensorflow() is tf
    assert hidden == calls
