"""Where an exported network is written: beside its place first, so that it is whole or not there."""

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from nfnet_keras.exporting.running import SUFFIXES
from nfnet_keras.training.files import to_disk

DESCRIPTION = "nfnet_keras.json"
"""What the description of a SavedModel is called, in its folder `assets.extra`; a file's has its name and .json."""


def check_target(target: Path, format: str, overwrite: bool) -> None:
    """Raises unless a network can be written to a path.

    Args:
        target: Absolute path of the file or folder.
        format: Keras's name of the format.
        overwrite: Whether something may be there.

    Raises:
        FileExistsError: If something is there that may not be replaced.
        FileNotFoundError: If the folder around it is missing.

    Example:

    >>> check_target(Path("/no/such/folder/a.onnx"), "onnx", False)
    Traceback (most recent call last):
    ...
    FileNotFoundError: there is no folder '/no/such/folder'; make it first
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r}; make it first")
    if format == "tf_saved_model":
        # A folder of other things is not replaced, whatever was asked for.
        ours = target.is_dir() and ((target / "saved_model.pb").is_file() or not any(target.iterdir()))
        if os.path.lexists(target) and not ours:
            raise FileExistsError(f"{str(target)!r} is there and is no SavedModel; name another folder")
        found = [target] if ours and any(target.iterdir()) else []
    else:
        files = [target, target.with_name(f"{target.name}.json")]
        files += [target.with_suffix(".bin")] if format == "openvino" else []
        if folder := next((file for file in files if file.is_dir()), None):
            raise FileExistsError(f"{str(folder)!r} is a folder; name a file ({SUFFIXES[format]}) in it")
        found = [file for file in files if os.path.lexists(file)]
    if found and not overwrite:
        raise FileExistsError(
            f"{str(found[0])!r} is there already; name another, or have it overwritten (overwrite=True, --overwrite)"
        )


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Gives an empty hidden folder in the same folder as `target`, and removes it in the end.

    Folders that exports to the same place left behind when they were killed are removed too.

    Args:
        target: Where the network is to be.

    Yields:
        The folder.

    Example:

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.onnx"
    >>> with written_beside(target) as folder:
    ...     folder.name.startswith(".a.onnx.")
    True
    >>> folder.exists()
    False
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.exporting")
    for left in target.parent.iterdir():
        match = pattern.fullmatch(left.name)
        if match and left.is_dir() and not _runs(int(match[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.parent / f".{target.name}.{os.getpid()}.exporting"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    if os.name == "nt":
        # There, the call would end it.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def put_in_place(folder: Path, target: Path) -> None:
    """Gives what was written beside its place its names, once it is on the disk; the network itself comes last.

    Args:
        folder: Of `written_beside`.
        target: Where the network is to be; other files of the folder come beside it.

    Example:

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.onnx"
    >>> with written_beside(target) as folder:
    ...     _ = (folder / "a.onnx").write_text("network")
    ...     put_in_place(folder, target)
    >>> [file.name for file in target.parent.iterdir()]
    ['a.onnx']
    """
    for place in [*folder.rglob("*"), folder]:
        if place.is_file():
            # Some writers give the file to its owner alone.
            place.chmod(stat.S_IMODE(place.stat().st_mode) | _readable())
        to_disk(place)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
        goal = target.with_name(file.name)
        if goal.is_dir():
            os.replace(goal, folder / ".old")
        os.replace(file, goal)
    to_disk(target.parent)


def _readable() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o444 & ~mask


def write_description(written: Path, format: str, description: dict) -> Path:
    """Writes the description of a network beside it, or into a SavedModel.

    Args:
        written: The file or folder.
        format: Keras's name of the format.
        description: What JSON holds.

    Returns:
        Path of the JSON file.

    Example:

    >>> import tempfile
    >>> write_description(Path(tempfile.mkdtemp()) / "a.onnx", "onnx", {}).name
    'a.onnx.json'
    """
    # TensorFlow leaves assets.extra to others.
    inside = format == "tf_saved_model"
    place = written / "assets.extra" / DESCRIPTION if inside else written.with_name(f"{written.name}.json")
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return place


def finish_onnx(path: Path, description: dict) -> None:
    """Names what exporters leave unnamed, the batch and the outputs, and puts the description into the file.

    Args:
        path: An ONNX file.
        description: What JSON holds; each entry becomes one of the file's metadata.

    Example:

    >>> import tempfile
    >>> from onnx import TensorProto, helper, load, save
    >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 2]) for name in "xy")
    >>> graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [x], [y])
    >>> path = Path(tempfile.mkdtemp()) / "a.onnx"
    >>> save(helper.make_model(graph), str(path))
    >>> finish_onnx(path, {"outputs": [{"kind": "logits"}]})
    >>> load(str(path)).graph.output[0].name
    'logits'
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    kinds = [output["kind"] for output in description["outputs"]]
    names = {}
    for number, (output, kind) in enumerate(zip(graph.output, kinds, strict=True)):
        names[output.name] = kind if len(kinds) == 1 else f"{kind}_{number}"
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    for output in graph.output:
        output.name = names[output.name]
    free = [value for value in (*graph.input, *graph.output) if not value.type.tensor_type.shape.dim[0].dim_value]
    for value in free:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(
        model, {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
