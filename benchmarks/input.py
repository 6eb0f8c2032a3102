"""Images per second per core of the training pipeline, beside timm's loader and Keras's preprocessing layers.

    python -m benchmarks.input [--rounds 5] [--quick]
    python -m benchmarks.input --profile

JPEG files of about 500 x 375 pixels are made from a seed. Each side reads all of them and makes batches of normalised
images that are cropped, flipped, mixed (half MixUp, half CutMix) and augmented, and is counted by the processor's time
that it takes, and by the time on the clock; see `benchmarks.input_sides` for what each side is. With `--profile`, our
pipeline is cut off after each of its stages, and the differences are printed.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks import input_sides
from benchmarks.environments import environment_for
from benchmarks.input_sides import Case
from benchmarks.results import Part, Requirement, Result, main, unless_quick

BATCH = 128
IMAGES, FOLDERS = 256, 8
# Seconds that each side runs before it is counted, and while it is.
BEFORE, COUNTED = 0.7, 3.0
UNIT = "images/s/core"

# Name, size of the images, layers and magnitude of RandAugment, whether mixed from twice the images.
CASES = (
    ("F0: 192 x 192, RandAugment 4 x 5", 192, 4, 5, False),
    ("F1: 224 x 224, RandAugment 4 x 10", 224, 4, 10, False),
    ("192 x 192, no RandAugment", 192, 0, 0, False),
    ("224 x 224, no RandAugment", 224, 0, 0, False),
    ("F0 as in the paper, mixed from twice the images", 192, 4, 5, True),
)
NOTES = {
    "ours": "training_batches, antialias=False",
    "timm": "create_loader on Pillow, as many workers as cores, FastCollateMixup; RandAugment has 15 operations, "
    "always done, and comes before mixing",
    "keras": "tf.data with Resizing, RandomCrop, RandomFlip, RandAugment, MixUp, CutMix, Normalization; no layer crops "
    "boxes of random size; RandAugment computes all of its 11 operations and picks one",
}


def photograph(generator, width: int, height: int):
    """Returns a picture with the statistics of a photograph: smooth at all scales, shapes with edges, and grain."""
    import numpy as np
    from PIL import Image, ImageDraw

    total = np.zeros((height, width, 3), np.float32)
    cells = 2
    while cells <= 256:
        grid = generator.normal(0.0, 1.0, (math.ceil(cells * height / width) + 1, cells + 1, 3)).astype(np.float32)
        # Neighbouring channels of a photograph are alike.
        grid = 0.8 * grid[..., :1] + 0.35 * grid
        planes = [Image.fromarray(grid[..., i]).resize((width, height), Image.Resampling.BICUBIC) for i in range(3)]
        total += 80.0 / cells**0.45 * np.stack([np.asarray(plane) for plane in planes], axis=-1)
        cells *= 2
    picture = Image.fromarray(np.clip(128.0 + total, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(12):
        left, top = generator.integers(0, width), generator.integers(0, height)
        reach = generator.integers(10, 120, 2)
        colour = (*generator.integers(0, 256, 3).tolist(), int(generator.integers(90, 256)))
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape([left - reach[0], top - reach[1], left + reach[0], top + reach[1]], fill=colour)
    grain = generator.normal(0.0, 9.0, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def make_files(folder: pathlib.Path, seed: int, images: int) -> float:
    """Writes a folder of class folders of JPEG files.

    Returns:
        The mean size of a file in bytes.
    """
    import numpy as np

    generator, total = np.random.default_rng(seed), 0
    for number in range(images):
        shape = (500, 375) if generator.random() < 0.8 else (375, 500)
        place = folder / str(number % FOLDERS)
        place.mkdir(parents=True, exist_ok=True)
        photograph(generator, *shape).save(place / f"{number}.jpg", quality=90)
        total += (place / f"{number}.jpg").stat().st_size
    return total / images


@contextlib.contextmanager
def side(name: str, python: pathlib.Path, folder: pathlib.Path, case: Case) -> Iterator[subprocess.Popen]:
    """Starts a side in a process of its own, which has gone through the images once."""
    numbers = [str(int(value)) for value in dataclasses.astuple(case)]
    command = [str(python), "-m", "benchmarks.input_sides", name, str(folder), *numbers]
    root = pathlib.Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": root}
    # A session of its own, so that its workers can be stopped with it.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, start_new_session=True, **pipes) as process,
    ):
        process.about = process.stdout.readline()
        if not process.about:
            process.wait()
            errors.seek(0)
            raise RuntimeError(f"the side {name!r} did not start: {' '.join(command)}\n{errors.read()[-2000:]}")
        os.killpg(process.pid, signal.SIGSTOP)
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def measure(process: subprocess.Popen, before: float, counted: float) -> dict[str, float]:
    """Lets a side run for a while; it stands still before and after, and does not work ahead."""
    os.killpg(process.pid, signal.SIGCONT)
    process.stdin.write(f"{before} {counted}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    os.killpg(process.pid, signal.SIGSTOP)
    if not answer:
        raise RuntimeError("a side ended while it was measured")
    return json.loads(answer)


def python_of(options, name: str) -> pathlib.Path:
    """Returns the Python that a side runs with; makes its environment if need be."""
    if name != "timm":
        return pathlib.Path(sys.executable)
    return environment_for(name, options.environments, options.device)


def run(options) -> Iterator[Part]:
    """Measures all sides of all cases, the sides of a case in turn."""
    # Ended from outside, it must still end the sides, which stand still.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pythons = {}
    for name in input_sides.SIDES:
        try:
            pythons[name] = python_of(options, name)
        except RuntimeError as error:
            yield [Result("not run", name, "", [], note=str(error))], []
    images, batch = (8, 4) if options.quick else (IMAGES, BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        mean = make_files(folder, options.seed, images)
        print(f"{images} JPEG files of {mean / 1024:.0f} KiB on average", file=sys.stderr)
        for about, size, layers, magnitude, twice in CASES[:1] if options.quick else CASES:
            case = Case(size, batch, layers, magnitude, twice, options.seed)
            results = _one_case(options, about, case, folder, pythons)
            yield results, unless_quick(options, _requirements(about, results))


def _one_case(options, about: str, case: Case, folder: pathlib.Path, pythons: dict[str, pathlib.Path]) -> list[Result]:
    cores = os.cpu_count()
    seconds = (0.0, 0.1) if options.quick else (BEFORE, COUNTED)
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(side(name, python, folder, case)) for name, python in pythons.items()}
        rounds = [
            {name: measure(process, *seconds) for name, process in sides.items()} for _ in range(options.rounds + 1)
        ][1:]
        versions = {name: json.loads(process.about)["about"] for name, process in sides.items()}
    results = []
    for name in sides:
        found = [each[name] for each in rounds]
        by_processor = [each["images"] / each["processor"] for each in found]
        by_clock = [each["images"] / each["wall"] / cores for each in found]
        note = f"{versions[name]}; {NOTES[name]}"
        results += [
            Result(f"{about}, processor's time", name, UNIT, by_processor, note=note),
            Result(f"{about}, time on the clock", name, UNIT, by_clock),
        ]
    return results


def _requirements(about: str, results: list[Result]) -> list[Requirement]:
    medians = {(each.case, each.side): each.median for each in results}
    return [
        Requirement(f"{case} is at least that of {peer}", medians[case, "ours"] / medians[case, peer], 1.0)
        for case, peer in medians
        if peer != "ours"
    ]


if __name__ == "__main__":
    if "--profile" in sys.argv:
        from benchmarks import input_profile

        print(input_profile.profile())
    else:
        main(run)
