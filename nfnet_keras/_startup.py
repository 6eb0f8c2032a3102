"""Imported before Keras: how the command line runs TensorFlow. For a library's user, TensorFlow decides."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def is_command_line() -> bool:
    """Whether this process is `nfnet` or `python -m nfnet_keras`."""
    if Path(sys.argv[0]).stem == "nfnet":
        return True
    return sys.argv[0] == "-m" and "nfnet_keras" in sys.orig_argv[:4]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what is written to the standard error's file: TensorFlow's first lines heed no setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


if is_command_line():
    # By default for processors with AVX-512 alone; without them, too, a training step is faster by a sixth.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # For all lines after the first; read once, when TensorFlow is loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3":
        try:
            with _silent_stderr():
                import keras  # noqa: F401
                import tensorflow  # noqa: F401 (reads the images under every backend)
        except ModuleNotFoundError as error:
            if error.name not in ("jax", "torch"):
                raise
            # A traceback through Keras says nothing that this line does not.
            print(
                f"nfnet: error: KERAS_BACKEND={error.name}, and {error.name} is not installed. Install it "
                f'(pip install "nfnet-keras[{error.name}]"), or set KERAS_BACKEND=tensorflow',
                file=sys.stderr,
            )
            sys.exit(1)
