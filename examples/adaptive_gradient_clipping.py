"""What adaptive gradient clipping (AGC) is for: the paper's Figure 2 at small scale, on real images.

    python examples/adaptive_gradient_clipping.py --out RUNS [--quick]

A small NF-ResNet with AGC, the same without AGC, and a batch-normalised pre-activation ResNet of the same depths
and widths are trained with one recipe on scikit-learn's scans of digits, over a grid of batch sizes and learning rates
(`FULL` below). RUNS gets `adaptive_gradient_clipping.json`, a row a run, and the picture made from it. Each run is
written down as it ends: the same command goes on where it was stopped, and only draws once every run is there.

The full grid, 189 runs, took 25 minutes of one core beside other work; `--quick`, six shorter runs, half a minute.

Differs from Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 4.1: the images, the size of everything, one
clipping threshold with a larger floor, and a learning rate that is varied and not only scaled with the batch.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
from keras import layers
from plain_resnet import plain_resnet

import nfnet_keras as nfk
from nfnet_keras import data
from nfnet_keras.applications.nf_resnet import NFResNet, NFResNetVariant

NAME = "adaptive_gradient_clipping"
BATCH_NORM, PLAIN, CLIPPED = "batch-normalised", "NF without AGC", "NF with AGC"
NETWORKS = {BATCH_NORM: ("tab:blue", "s"), PLAIN: ("tab:orange", "o"), CLIPPED: ("tab:green", "^")}
TRAINING_IMAGES = 1024  # Every batch size of the grid divides it, so that all runs see the same number of images.
IMAGE_SIZE = 32
CLASSES = 10
CHANCE = 1 / CLASSES


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is run, and how.

    Args:
        batch_sizes: Images a step; each divides `TRAINING_IMAGES`.
        learning_rates: Peaks of the schedule. A batch of 256 has 0.1 in the paper.
        seeds: Each is a start of the weights and an order of the images.
        epochs: Passes over the training images.
        warmup: Share of the steps in which the rate rises from 0; then it falls to 0 like a cosine.
        clip_factor: AGC's largest ratio of gradient to weight norm. The paper tries 0.01 to 0.16.
        eps: AGC's floor of a weight norm. With the authors' 1e-3, the skip gains, which start at 0, stay small for
            longer than these short runs last.
        weight_decay: On kernels.
        depths: Blocks of the four stages.
        width: Factor on the widths: the stages have 64, 128, 256 and 512 times this.
    """

    batch_sizes: tuple[int, ...] = (64, 256, 512)
    learning_rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 30
    warmup: float = 0.1
    clip_factor: float = 0.08
    eps: float = 0.1
    weight_decay: float = 5e-5
    depths: tuple[int, int, int, int] = (1, 1, 1, 1)
    width: float = 0.25

    def settings(self) -> dict:
        """Returns what makes two runs comparable: everything but the axes of the grid."""
        axes = ("batch_sizes", "learning_rates", "seeds")
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in axes}
        return json.loads(json.dumps({"data": "digits", "training_images": TRAINING_IMAGES, **kept}))

    def groups(self) -> Iterator[tuple[int, int, str]]:
        """Gives (seed, batch size, network), seed by seed, so that a grid broken off is whole for the first seeds."""
        for seed in self.seeds:
            for batch_size in sorted(self.batch_sizes, reverse=True):
                for network in NETWORKS:
                    yield seed, batch_size, network


FULL = Grid()
QUICK = Grid(batch_sizes=(256,), learning_rates=(0.05, 0.8), seeds=(0,), epochs=20)


def batch_normalised_resnet(depths: tuple[int, ...], widths: tuple[int, ...], momentum: float) -> keras.Model:
    """Builds the pre-activation ResNet that an NF-ResNet is without normalisation: batch norm before every ReLU.

    Args:
        depths: Blocks of each stage.
        widths: Output channels of each stage; the stem has a quarter of the first, each block's inside of its own.
        momentum: Of the moving averages of batch norm.

    Returns:
        A Keras model of 32 x 32 x 3 images and ten classes.
    """

    def act(x):
        return layers.ReLU()(layers.BatchNormalization(momentum=momentum, epsilon=1e-5)(x))

    inputs = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    x = plain_resnet(inputs, depths, widths, act)
    x = layers.GlobalAveragePooling2D()(act(x))
    head = keras.initializers.RandomNormal(stddev=0.01)  # That of the NF-ResNet.
    x = layers.Dense(CLASSES, activation="softmax", kernel_initializer=head, name="predictions")(x)
    return keras.Model(inputs, x)


def build(network: str, grid: Grid, batch_size: int) -> keras.Model:
    """Returns a new network, compiled for `train`."""
    row = NFResNetVariant("nf_resnet_small", grid.depths, 0.0, IMAGE_SIZE, IMAGE_SIZE, grid.width)
    clip_factor = grid.clip_factor if network == CLIPPED else None
    optimizer = nfk.optimizers.SGD_AGC(1.0, weight_decay=grid.weight_decay, clip_factor=clip_factor, eps=grid.eps)
    options = {"optimizer": optimizer, "loss": "categorical_crossentropy", "metrics": ["accuracy"]}
    if network == BATCH_NORM:
        # Keras's 0.99 remembers a hundred steps, more than some of these runs have; this remembers two epochs.
        momentum = 1 - batch_size / (2 * TRAINING_IMAGES)
        model = batch_normalised_resnet(grid.depths, row.channels, momentum)
        model.compile(jit_compile=False, **options)
    else:
        model = NFResNet(row, weights=None, classes=CLASSES, stochastic_depth_rate=0.0)
        model.compile(jit_compile=False, clip_factor=None, **options)  # The optimizer clips, or nobody does.
    return model


class Schedule(keras.callbacks.Callback):
    """Sets the learning rate of each step; so one compiled model serves every rate of the grid.

    Args:
        rates: The rate of each step of the run, times `peak`.
        peak: The largest rate.
    """

    def __init__(self, rates: np.ndarray, peak: float):
        super().__init__()
        self.rates = rates * peak
        self.step = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate.assign(self.rates[self.step])
        self.step += 1


def images() -> tuple[data.Split, data.Split]:
    """Returns 1024 digits to train on and the 773 others to test on, always the same."""
    digits = data.digits()
    pixels = np.concatenate([digits.train.images, digits.test.images])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    order = np.random.default_rng(0).permutation(len(labels))
    chosen, rest = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return data.Split(labels[chosen], images=pixels[chosen]), data.Split(labels[rest], images=pixels[rest])


class Trainer:
    """Trains one network at one batch size and seed with one learning rate after the other.

    Args:
        grid: The recipe.
        network: One of `NETWORKS`.
        batch_size: Images a step.
        seed: Of weights and order.
    """

    def __init__(self, grid: Grid, network: str, batch_size: int, seed: int):
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        self.grid, self.network, self.batch_size, self.seed = grid, network, batch_size, seed
        self.model = build(network, grid, batch_size)
        self.model.optimizer.build(self.model.trainable_variables)
        self.weights = self.model.get_weights()
        self.steps = TRAINING_IMAGES // batch_size
        total = self.steps * grid.epochs
        shape = nfk.optimizers.warmup_cosine(1.0, total, max(1, round(grid.warmup * total)))
        self.shape = np.array([float(shape(step)) for step in range(total)])

        train, test = images()
        augment = data.Augment(flip=False, min_area=1.0)
        batches = data.training_batches(train, CLASSES, IMAGE_SIZE, batch_size, augment, seed, epochs=grid.epochs)
        whole = data.evaluation_batches(train, CLASSES, IMAGE_SIZE, TRAINING_IMAGES)
        pixels = np.concatenate([images for images, _ in whole])
        mean = pixels.mean(axis=0)
        stddev = (pixels - mean).std()

        def centre(images, labels):
            # What all images have in common drowns what tells them apart in a network without batch norm.
            return (images - mean) / stddev, labels

        self.batches = batches.map(centre)
        self.held_out = data.evaluation_batches(test, CLASSES, IMAGE_SIZE, len(test)).map(centre)

    def train(self, learning_rate: float) -> dict:
        """Trains from the start and returns the row of the run."""
        start = time.perf_counter()
        self.model.set_weights(self.weights)
        for variable in self.model.optimizer.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))
        history = self.model.fit(
            self.batches,
            epochs=self.grid.epochs,
            steps_per_epoch=self.steps,
            shuffle=False,
            verbose=0,
            callbacks=[Schedule(self.shape, learning_rate), keras.callbacks.TerminateOnNaN()],
        ).history
        result = self.model.evaluate(self.held_out, verbose=0, return_dict=True)
        diverged = not (np.isfinite(history["loss"]).all() and np.isfinite(result["loss"]))
        return {
            "network": self.network,
            "batch_size": self.batch_size,
            "learning_rate": learning_rate,
            "seed": self.seed,
            "accuracy": CHANCE if diverged else round(result["accuracy"], 4),
            "diverged": diverged,
            "training_loss": None if diverged else float(f"{history['loss'][-1]:.3g}"),
            "seconds": round(time.perf_counter() - start, 1),
        }


def write_aside(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def run(grid: Grid, path: Path) -> list[dict]:
    """Trains whatever of the grid is not yet in the file.

    Args:
        grid: What is to be run.
        path: The JSON file, which need not be there.

    Returns:
        The rows of the file.

    Raises:
        ValueError: If the file is of runs with other settings.
    """
    settings, rows = grid.settings(), []
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] != settings:
            raise ValueError(f"{str(path)!r} holds runs with other settings; name another folder with --out")
        rows = stored["runs"]
    done = {(row["seed"], row["batch_size"], row["network"], row["learning_rate"]) for row in rows}
    for group in grid.groups():
        missing = [rate for rate in grid.learning_rates if (*group, rate) not in done]
        if not missing:
            continue
        seed, batch_size, network = group
        trainer = Trainer(grid, network, batch_size, seed)
        for rate in missing:
            row = trainer.train(rate)
            rows.append(row)
            lines = ",\n".join("  " + json.dumps(row) for row in rows)
            write_aside(path, f'{{"settings": {json.dumps(settings)},\n "runs": [\n{lines}\n]}}\n')
            ending = "diverged" if row["diverged"] else f"{row['accuracy']:.4f}"
            print(f"{network}, batch {batch_size}, rate {rate}, seed {seed}: {ending} ({row['seconds']} s)", flush=True)
    return rows


def accuracies(rows: list[dict], **chosen) -> list[float]:
    """Returns the accuracies of the runs that have these values."""
    return [row["accuracy"] for row in rows if all(row[key] == value for key, value in chosen.items())]


def best(rows: list[dict], network: str, batch_size: int) -> tuple[float, float, list[float]]:
    """Returns the learning rate of the highest mean accuracy, that mean, and the accuracies it is of."""
    rates = sorted({row["learning_rate"] for row in rows})
    found = [(rate, accuracies(rows, network=network, batch_size=batch_size, learning_rate=rate)) for rate in rates]
    rate, values = max(((rate, values) for rate, values in found if values), key=lambda pair: np.mean(pair[1]))
    return rate, float(np.mean(values)), values


def draw(rows: list[dict], path: Path) -> None:
    """Draws accuracy at the best rate against batch size, and accuracy against learning rate at each batch size.

    Args:
        rows: The runs.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(9, 3.5 * ((len(sizes) + 2) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots((len(sizes) + 2) // 2, 2, sharey=True, squeeze=False).flat
    first = next(panels)
    for network, (colour, marker) in NETWORKS.items():
        points = [best(rows, network, size) for size in sizes]
        means = np.array([mean for _, mean, _ in points])
        spread = [means - [min(v) for *_, v in points], [max(v) for *_, v in points] - means]
        first.errorbar(sizes, means, spread, marker=marker, capsize=3, color=colour, label=network)
    first.set_title("best learning rate of each batch size", fontsize=10)
    first.set_xlabel("batch size")
    first.set_xscale("log", base=2)
    first.set_xticks(sizes, [str(size) for size in sizes])
    for size, axes in zip(sizes, panels, strict=False):
        _draw_rates(axes, [row for row in rows if row["batch_size"] == size])
        axes.set_title(f"batch of {size}", fontsize=10)
    for axes in figure.axes:
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_tick_params(labelleft=True)
        axes.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
    first.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 0.12))
    for axes in panels:
        axes.set_visible(False)
    aside = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(aside, dpi=100)
    os.replace(aside, path)


def _draw_rates(axes, rows: list[dict]) -> None:
    rates = sorted({row["learning_rate"] for row in rows})
    for network, (colour, shape) in NETWORKS.items():
        mine = [row for row in rows if row["network"] == network]
        known = [rate for rate in rates if accuracies(mine, learning_rate=rate)]
        axes.plot(known, [np.mean(accuracies(mine, learning_rate=rate)) for rate in known], color=colour)
        for diverged, marker in ((False, shape), (True, "x")):
            points = [(row["learning_rate"], row["accuracy"]) for row in mine if row["diverged"] == diverged]
            axes.plot([x for x, _ in points], [y for _, y in points], marker, color=colour, markersize=5, alpha=0.7)
    axes.plot([], [], "x", color="grey", label="diverged (NaN), counted as chance")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.12))
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate")


def main(out: str | os.PathLike, grid: Grid = FULL) -> list[dict]:
    """Runs what is missing of the grid, draws the picture, prints the best of each network, and returns the runs."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = run(grid, folder / f"{NAME}.json")
    draw(rows, folder / f"{NAME}.png")
    for size in sorted({row["batch_size"] for row in rows}):
        for network in NETWORKS:
            rate, mean, values = best(rows, network, size)
            print(f"batch {size}, {network}: {mean:.4f} at rate {rate:g} ({len(values)} runs)")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, help="folder of the runs and the picture")
    parser.add_argument("--quick", action="store_true", help="six short runs, about half a minute")
    flags = parser.parse_args()
    main(flags.out, QUICK if flags.quick else FULL)
