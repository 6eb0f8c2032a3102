"""Draws how a signal propagates through a normalizer-free ResNet, a plain one and a batch-normalised one.

The diagnostic of "Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets" (Brock, De,
Smith 2021, section 3), at initialisation, for images of noise. The three networks have the same shape: pre-activation
bottleneck blocks with strided projections. In the plain one (ReLU, convolutions drawn after He et al.) each block adds
a branch about as large as its input, so that the variance about doubles from block to block. Batch normalisation holds
the branches at one size. The NF-ResNet holds them by scaled weight standardization, a constant gain behind ReLU, beta
in front of each block and alpha behind it.

NF-ResNets have skip gains, which are zero at first: each block is its shortcut then, and there is little to see. The
paper's plots are of networks without them. So they are taken for 1 here, and the picture says so. The batch-normalised
network is measured in training mode, with the statistics of the batch.

    python examples/signal_propagation.py --out docs/signal_propagation.png
"""

import argparse
import os
from pathlib import Path

import keras
import numpy as np
from keras import layers
from plain_resnet import plain_resnet

import nfnet_keras as nfk
from nfnet_keras.applications.nf_resnet import NFResNet, NFResNetVariant

FREE, PLAIN, BATCH_NORM = "NF-ResNet", "without normalisation", "batch-normalised"
DEPTHS = (3, 4, 23, 3)
WIDTH = 1.0
ALPHA = 0.2
IMAGES, IMAGE_SIZE = 16, 96


def resnet(depths: tuple[int, ...], widths: tuple[int, ...], normalised: bool) -> keras.Model:
    """Builds the pre-activation ResNet of the shape of an NF-ResNet.

    Args:
        depths: Blocks of each stage.
        widths: Output channels of each stage; the stem has a quarter of the first, each block's inside of its own.
        normalised: Whether batch normalisation stands before every ReLU.

    Returns:
        A Keras model from images to the last stage's output.
    """

    def act(x):
        return layers.ReLU()(layers.BatchNormalization(epsilon=1e-5)(x) if normalised else x)

    inputs = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    return keras.Model(inputs, plain_resnet(inputs, depths, widths, act))


def expected_variances(depths: tuple[int, ...], alpha: float) -> list[float]:
    """Returns the variance behind each block that an NF-ResNet is built for: 1 + alpha^2 for each block of a stage."""
    return [1 + alpha**2 * block for depth in depths for block in range(1, depth + 1)]


def measure(depths: tuple[int, ...] = DEPTHS, seed: int = 0) -> dict[str, nfk.SignalPropagation]:
    """Measures the three networks on the same noise."""
    keras.utils.set_random_seed(seed)
    row = NFResNetVariant("nf_resnet_narrow", depths, 0.0, IMAGE_SIZE, IMAGE_SIZE, WIDTH)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    images = np.random.default_rng(seed).standard_normal((IMAGES, *shape), dtype="float32")
    free = NFResNet(row, weights=None, include_top=False, input_shape=shape, alpha=ALPHA, stochastic_depth_rate=0.0)
    return {
        FREE: nfk.signal_propagation(free, images, skip_gain=1.0),
        PLAIN: nfk.signal_propagation(resnet(depths, row.channels, normalised=False), images),
        BATCH_NORM: nfk.signal_propagation(resnet(depths, row.channels, normalised=True), images, training=True),
    }


def draw(reports: dict[str, nfk.SignalPropagation], depths: tuple[int, ...], path: Path) -> None:
    """Draws the three networks, and the variance of the normalizer-free one by itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Signal propagation at initialisation, images of noise, {sum(depths)} residual blocks\n"
        "(NF-ResNet with its skip gains, which start at 0, taken for 1)",
        fontsize=11,
    )
    (variance, alone), (branch, mean) = figure.subplots(2, 2)
    panels = (
        (variance, "variance", "average channel variance"),
        (branch, "branch_variance", "variance at the end of the residual branch"),
        (mean, "squared_mean", "average channel squared mean"),
    )
    for axes, name, about in panels:
        for label, report in reports.items():
            axes.plot([getattr(row, name) for row in report.rows], label=label)
        axes.set_yscale("log")
        axes.set_title(about, fontsize=10)
    variance.legend(fontsize=9)
    blocks = range(1, sum(depths) + 1)
    alone.plot(blocks, [row.variance for row in reports[FREE].rows[1:]], label="measured")
    alone.plot(blocks, expected_variances(depths, ALPHA), "--", color="grey", label="what $\\beta$ is chosen for")
    alone.set_ylim(bottom=0)
    alone.set_title(f"{FREE}: average channel variance, linear", fontsize=10)
    alone.legend(fontsize=9)
    for axes in figure.axes:
        for first in np.cumsum((1, *depths[:-1])):
            axes.axvline(first, color="grey", linestyle=":", linewidth=0.8)
        axes.set_xlabel("block (dotted: the first of a stage)")
        axes.grid(alpha=0.3)
    aside = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(aside, dpi=100)
    os.replace(aside, path)


def main(out: str | os.PathLike, depths: tuple[int, ...] = DEPTHS) -> dict[str, nfk.SignalPropagation]:
    """Measures, prints the first and the last block of each network, draws the picture and returns the reports."""
    reports = measure(depths)
    draw(reports, depths, Path(out))
    for name, report in reports.items():
        first, last = report.rows[1], report.rows[-1]
        print(f"{name}: variance behind the first block {first.variance:.3g}, behind the last {last.variance:.3g}")
    return reports


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, help="the PNG file")
    main(parser.parse_args().out)
