"""NFNet-F1 beside EfficientNet-B7, each at the size that the paper trains it at.

    python -m benchmarks.headline [--rounds 5] [--quick]

The paper (Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, abstract) says that an NFNet trains up to 8.7 times as
fast as EfficientNet-B7 at the same accuracy, on TPUv3. Here: one training step each (`train_on_batch`) at the same
batch size, float32, random weights, and the same optimizer, with AGC for the NFNet and without for EfficientNet; and
the forward pass. The ratio is reported and held against nothing: it depends on the machine.
"""

import statistics
from collections.abc import Iterator

from benchmarks import parameters
from benchmarks.protocol import Sides, in_turn
from benchmarks.results import Part, Result, main
from benchmarks.sides.networks import EFFICIENTNET, SMALL_EFFICIENTNET, way

BATCH = 1
MODELS = (("nfnet_f1", 224, "ours, NFNet-F1"), (EFFICIENTNET, 600, "keras.applications, EfficientNet-B7"))


def run(options) -> Iterator[Part]:
    """Measures a training step and a forward pass of both."""
    with Sides(options) as sides:
        for kind, title in (("predict_on_batch", "forward"), ("train_on_batch", "training step")):
            yield _in_turn(sides, kind, f"{title}, NFNet-F1 and EfficientNet-B7, batch {BATCH}"), []
        yield sides.remarks(), []


def _in_turn(sides: Sides, kind: str, case: str) -> list[Result]:
    options, processes, sizes = sides.options, [], {}
    for model, size, name in MODELS:
        if options.quick:
            model, size = (SMALL_EFFICIENTNET, 64) if model == EFFICIENTNET else ("nfnet_tiny", 32)
        process = sides.start(way(name), kind, model=model, size=size, seed=options.seed)
        if process is None:
            continue
        path = sides.folder / f"headline-{size}.npz"
        processes += sides.feed([process], parameters.write_inputs(path, BATCH, size, 1000, options.seed))
        sizes[name] = size
    times = in_turn(processes, 1 if options.quick else min(options.rounds, 4), sides=sides)
    results = []
    for process in processes:
        name = process.way.name
        if name in times:
            memory, note = process.ask("peak")["life"], f"{sizes[name]} x {sizes[name]}"
            results.append(Result(case, name, "s", times[name], note=note, memory=memory))
    sides.stop(processes)
    if len(results) == 2:
        ours, theirs = (statistics.median(result.values) for result in results)
        note = f"NFNet-F1 takes {theirs / ours:.2f} times as many images a second as EfficientNet-B7"
        results.append(Result("note", f"{case}: {note} (the paper: 8.7 in training, on TPUv3)", "", []))
    return results


if __name__ == "__main__":
    main(run)
