"""What fine-tuning is worth: few images of new classes, with and without a network that has seen other classes.

    python examples/transfer.py --out docs/transfer.json

The small NFNet learns scikit-learn's handwritten digits 0 to 4. Then it gets the digits 5 to 9, of which there are only
5, 10 or 20 training images a class, in several ways of fine-tuning; and the same network learns the same images from
scratch, in the same number of steps. Every way gets the learning rate that is best for it, found with other draws of
10 images a class by the accuracy on training images that were not drawn; what is reported is the accuracy on the
held-out images of the digits 5 to 9. Takes about ten minutes on a core; --quick, two seeds and two ways, takes one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

import nfnet_keras as nfk
from nfnet_keras import data
from nfnet_keras.training import fine_tuning

SIZE, CLASSES, BATCH = 32, 5, 25
AUGMENT = data.Augment(flip=False, min_area=1.0, shift=0.1, mixup=0.2, cutmix=0.0)
LEARNING_RATES, TUNING_SHOTS = (0.1, 0.2, 0.4, 0.8), 10
SCRATCH, ALL = "from scratch", "all layers"
LONGER, LONGER_ALL = (f"{way}, three times the steps" for way in (SCRATCH, ALL))
HEAD_ALONE, HEAD_FIRST = "head alone", "head first, then all layers"


def nothing(model: keras.Model) -> None:
    """Leaves a network as it is: all of it learns."""


# Name of a way to train: what is done to the network, and the learning rates of its parts (1 for all alike).
WAYS: dict[str, tuple[Callable, float]] = {
    SCRATCH: (nothing, 1.0),
    LONGER: (nothing, 1.0),
    ALL: (nothing, 1.0),
    LONGER_ALL: (nothing, 1.0),
    "stem and 2 of 4 stages frozen": (lambda model: fine_tuning.freeze(model, 2), 1.0),
    HEAD_ALONE: (fine_tuning.head_only, 1.0),
    HEAD_FIRST: (nothing, 1.0),
    "layer decay 0.75": (nothing, 0.75),
}


def part(images: data.ImageSet, digits: Sequence[int]) -> data.ImageSet:
    """Returns the images of some digits, numbered anew."""

    def choose(split):
        rows = np.isin(split.labels, digits)
        return data.Split(np.searchsorted(digits, split.labels[rows]), images=split.images[rows])

    names = tuple(images.class_names[digit] for digit in digits)
    return data.ImageSet(f"digits {names[0]} to {names[-1]}", names, choose(images.train), choose(images.test))


def draw(split: data.Split, shots: int, seed: int) -> tuple[data.Split, data.Split]:
    """Returns so many images of each class, drawn at random, and the others."""
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(split.labels == c))[:shots] for c in range(CLASSES)])
    rest = np.setdiff1d(np.arange(len(split)), chosen)
    return tuple(data.Split(split.labels[rows], images=split.images[rows]) for rows in (chosen, rest))


def values(model: keras.Model) -> list[np.ndarray]:
    """Returns all that a model holds, the states of its random numbers too."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.variables]


class Trainer:
    """A network compiled once for many runs: tracing a step takes longer than a run of this size."""

    def __init__(self, prepare: Callable, decay: float = 1.0):
        self.model = network()
        prepare(self.model)
        factors = fine_tuning.learning_rate_factors(self.model, decay)
        # With the paper's floor of 1e-3 the skip gains, which start at 0, would stay nearly shut in runs this short.
        self.optimizer = nfk.optimizers.SGD_AGC(0.1, clip_factor=0.02, eps=0.1, learning_rate_factors=factors)
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
        self.model.compile(self.optimizer, loss, metrics=["accuracy"])
        self.optimizer.build(self.model.trainable_variables)
        self.fresh = [np.array(keras.ops.convert_to_numpy(variable)) for variable in self.optimizer.variables]

    def train(self, start: list, split: data.Split, steps: int, learning_rate: float, seed: int, skip: int = 0) -> None:
        """Trains from the weights `start`: a tenth of the steps warms up, a cosine follows; `skip` leaves steps out."""
        for variable, value in zip(self.model.variables, start, strict=True):
            variable.assign(value)
        for variable, value in zip(self.optimizer.variables, self.fresh, strict=True):
            variable.assign(value)
        schedule = nfk.optimizers.warmup_cosine(learning_rate, total_steps=steps, warmup_steps=steps // 10)
        batches = data.training_batches(split, CLASSES, SIZE, BATCH, AUGMENT, seed).skip(skip)
        for step, (images, labels) in zip(range(skip, steps), batches, strict=False):
            self.optimizer.learning_rate = float(schedule(step))
            self.model.train_on_batch(images, labels)

    def accuracy(self, split: data.Split) -> float:
        """Share of the images that the network gets right."""
        batches = data.evaluation_batches(split, CLASSES, SIZE, 256)
        return self.model.evaluate(batches, verbose=0, return_dict=True)["accuracy"]


def network() -> keras.Model:
    """Returns a new network."""
    return nfk.create_model(
        "nfnet_tiny", weights=None, input_shape=(SIZE, SIZE, 3), classes=CLASSES, stochastic_depth_rate=0.1
    )


class Comparison:
    """All runs; the first seeds are those of the result, the others serve to find learning rates."""

    def __init__(self, ways: Sequence[str], seeds: int, steps: int, pretraining_steps: int):
        digits = data.digits()
        self.old, self.new = part(digits, range(5)), part(digits, range(5, 10))
        self.steps = steps
        self.trainers = {}
        for way in ways:
            # Ways that differ in their first weights alone share a network, so that it is traced once.
            shared = [name for name in self.trainers if WAYS[name] == WAYS[way]]
            self.trainers[way] = self.trainers[shared[0]] if shared else Trainer(*WAYS[way])
        first = self.trainers[SCRATCH]
        self.fresh, self.start, self.pretraining = [], [], []
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            self.fresh.append(values(network()))
            first.train(values(network()), self.old.train, pretraining_steps, 0.2, seed)
            self.pretraining.append(round(first.accuracy(self.old.test), 4))
            self.start.append(values(nfk.replace_head(first.model, CLASSES)))

    def run(self, way: str, shots: int, learning_rate: float, seed: int, unused: bool = False) -> float:
        """Returns the accuracy on the held-out images, or on the training images that were not used."""
        few, rest = draw(self.new.train, shots, seed)
        start = (self.fresh if way in (SCRATCH, LONGER) else self.start)[seed]
        steps, skip = 3 * self.steps if way in (LONGER, LONGER_ALL) else self.steps, 0
        if way == HEAD_FIRST:
            skip = steps // 5
            self.trainers[HEAD_ALONE].train(start, few, skip, learning_rate, seed)
            start = values(self.trainers[HEAD_ALONE].model)
        self.trainers[way].train(start, few, steps, learning_rate, seed, skip)
        return self.trainers[way].accuracy(rest if unused else self.new.test)

    def tune(self, way: str, learning_rates: Sequence[float], seeds: Sequence[int]) -> dict[float, float]:
        """Returns the mean accuracy of each learning rate on images that were not used."""
        return {
            rate: round(statistics.mean(self.run(way, TUNING_SHOTS, rate, seed, unused=True) for seed in seeds), 4)
            for rate in learning_rates
        }


def compare(
    ways: Mapping[str, Sequence[int]],
    seeds: int = 5,
    steps: int = 60,
    pretraining_steps: int = 300,
    learning_rates: Sequence[float] = LEARNING_RATES,
    tuning_seeds: int = 2,
) -> dict:
    """Compares ways to train, each with the numbers of images a class that are asked for, and returns the numbers."""
    comparison = Comparison(list(ways), seeds + tuning_seeds, steps, pretraining_steps)
    print(f"Pretrained: {comparison.pretraining} of {comparison.old.name} right", flush=True)
    tuned, rows = {}, []
    for way, counts in ways.items():
        shorter = {LONGER: SCRATCH, LONGER_ALL: ALL}.get(way)
        tuned[way] = tuned.get(shorter) or comparison.tune(way, learning_rates, range(seeds, seeds + tuning_seeds))
        rate = max(tuned[way], key=tuned[way].get)
        for shots in counts:
            found = [round(comparison.run(way, shots, rate, seed), 4) for seed in range(seeds)]
            mean, deviation = statistics.mean(found), statistics.stdev(found)
            rows.append({"way": way, "images_a_class": shots, "learning_rate": rate, "accuracies": found})
            rows[-1] |= {"accuracy": round(mean, 4), "deviation": round(deviation, 4)}
            print(f"{shots:3} a class, {way:36} {100 * mean:5.1f} % ± {100 * deviation:.1f} ({rate})", flush=True)
    return {
        "network": "nfnet_tiny",
        "pretrained_on": comparison.old.name,
        "pretrained_accuracies": comparison.pretraining,
        "fine_tuned_on": comparison.new.name,
        "held_out_images": len(comparison.new.test),
        "seeds": seeds,
        "steps": steps,
        "batch_size": BATCH,
        "pretraining_steps": pretraining_steps,
        "accuracy_on_unused_images_by_learning_rate": {
            way: {str(rate): accuracy for rate, accuracy in found.items()} for way, found in tuned.items()
        },
        "results": rows,
    }


def main(arguments: Sequence[str]) -> dict:
    """Runs the comparison as the command line says; returns and writes its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="two ways, two seeds, one number of images")
    options = parser.parse_args(arguments)
    if options.quick:
        result = compare({SCRATCH: (10,), ALL: (10,)}, 2, pretraining_steps=200, learning_rates=(0.2,), tuning_seeds=1)
    else:
        counts = {SCRATCH: (10, 5, 20), ALL: (10, 5, 20)}
        result = compare({way: counts.get(way, (10,)) for way in (SCRATCH, ALL, *WAYS)})
    if options.out:
        with open(options.out, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
