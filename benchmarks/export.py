"""How long an exported network takes for an image, in each format that `nfk.export` writes.

    python -m benchmarks.export [--rounds 5] [--quick]

One image at once, float32 (and 8-bit integers in LiteRT), random parameters; each file in a process of its own, run by
the program that it is for, on all cores. The outputs of the float files are compared with Keras's first.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from benchmarks import parameters
from benchmarks.protocol import Process, SideError, Sides, in_turn
from benchmarks.results import Part, Requirement, Result, main
from benchmarks.sides import Way, export_side
from nfnet_keras.exporting.running import SUFFIXES

CASES = (("nfnet_tiny", 32, 20), ("nfnet_f0", 256, 2))
QUICK = (("nfnet_tiny", 32, 1),)
CLASSES = {"nfnet_tiny": 10}
AGREEMENT = 1e-3
REPRESENTATIVE = 8


def run(options) -> Iterator[Part]:
    """Measures every format of every network."""
    if options.device != "cpu":
        yield [Result("not run", "export", "", [], note="the programs for exported files are run on CPUs")], []
        return
    with Sides(options) as sides:
        for model, size, repeats in QUICK if options.quick else CASES:
            yield _one_case(sides, model, size, repeats)
        # Of the authors' program nothing is asked here.
        yield [each for each in sides.remarks() if "authors" not in each.case + each.side], []


def _one_case(sides: Sides, model: str, size: int, repeats: int) -> Part:
    options, title = sides.options, f"exported, {model}, {size} x {size}, batch 1"
    weights = sides.folder / f"{model}.safetensors"
    classes = CLASSES.get(model, 1000)
    if sides.draw(model, size, classes, weights) is None:
        return [], []
    representative = parameters.write_inputs(sides.folder / f"{model}-8.npz", REPRESENTATIVE, size, classes, 1)
    inputs = parameters.write_inputs(sides.folder / f"{model}-1.npz", 1, size, classes, options.seed)
    case = {"model": model, "size": size, "classes": classes, "weights": str(weights)}
    processes, sizes = [], {}
    for number, way in enumerate(export_side.ways()):
        path = sides.folder / f"{model}-{number}{SUFFIXES.get(way.options['format'], '')}"
        written = _written(sides, way, {**case, "path": str(path), "representative": str(representative)})
        if written is None:
            continue
        process = sides.start(way, "exported", path=str(path), **case)
        if process is not None:
            processes.append(process)
            sizes[way.name] = written
    processes = sides.feed(processes, inputs)
    differences = _differences(processes, sides)
    times = in_turn(processes, options.rounds, 1 if options.quick else repeats, 2, sides=sides)
    sides.stop(processes)
    results = [Result(title, name, "s", values, note=sizes[name]) for name, values in times.items()]
    requirements = [
        Requirement(f"{title}: {name} differs from Keras by (share of the largest output)", value, AGREEMENT, True)
        for name, value in differences.items()
    ]
    return results, requirements


def _written(sides: Sides, way: Way, case: dict) -> str | None:
    """Writes the file of a way; returns what the table says of it, `None` if that failed."""
    if way.options["format"] == "keras":
        return ""
    process = sides.start(way, "draw", write=True, **case)
    if process is None:
        return None
    sides.stop([process])
    about = f"{process.versions['bytes'] / 2**20:.1f} MiB"
    if way.options.get("quantize"):
        about += f"; {process.versions['agreement']:.0%} of {REPRESENTATIVE} random images get the same class"
    return about


def _differences(processes: list[Process], sides: Sides) -> dict[str, float]:
    """Compares what the float files say to one image with what Keras says."""
    outputs = {}
    for process in processes:
        path = pathlib.Path(sides.folder / "outputs.npz")
        try:
            process.ask("outputs", path=str(path))
        except SideError as error:
            sides.fail(process.way.name, error)
            continue
        with np.load(path) as arrays:
            outputs[process.way.name] = arrays["outputs"]
    keras = next(iter(outputs.values()))
    return {
        name: float(np.abs(found - keras).max() / np.abs(keras).max())
        for name, found in list(outputs.items())[1:]
        if "int8" not in name
    }


if __name__ == "__main__":
    main(run)
