"""Trains the weights that this package ships, and measures them as a start for other classes.

    python weights/make_digits.py

The small NFNet learns the digits 0 to 4 of scikit-learn's handwritten digits, as in examples/transfer.py, but for 600
steps. Beside the file of weights, nfnet_tiny-digits.safetensors, comes nfnet_tiny-digits.json: how it was made, its
SHA-256 (which belongs into nfnet_keras/checkpoints/manifest.json), its accuracy on held-out images, and what
fine-tuning it on ten images of each of the digits 5 to 9 gives, beside the same network from scratch. The same machine
gives the same file again. Takes a minute on a core.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
import transfer  # noqa: E402

import nfnet_keras as nfk  # noqa: E402
from nfnet_keras import data  # noqa: E402
from nfnet_keras.checkpoints import save_checkpoint  # noqa: E402
from nfnet_keras.checkpoints.download import digest  # noqa: E402

NAME = "nfnet_tiny-digits"
SEED, STEPS, LEARNING_RATE = 0, 600, 0.2
SHOTS, FEW_STEPS, SEEDS = 10, 60, 5


def main(arguments: Sequence[str]) -> dict:
    """Trains, measures and writes as the command line says; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of training; the shipped file had {STEPS}")
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    digits = data.digits()
    old, new = transfer.part(digits, range(5)), transfer.part(digits, range(5, 10))
    trainer = transfer.Trainer(transfer.nothing)
    trainer.train(transfer.values(transfer.network()), old.train, options.steps, LEARNING_RATE, SEED)
    path = options.out / f"{NAME}.safetensors"
    save_checkpoint(trainer.model, path, "timm")
    result = {
        "file": path.name,
        "sha256": digest(path, "sha256"),
        "bytes": path.stat().st_size,
        "command": "python weights/make_digits.py",
        "seed": SEED,
        "network": "nfnet_tiny",
        "training_data": f"{old.name} of scikit-learn's handwritten digits, {len(old.train)} images",
        "recipe": {
            "optimizer": "SGD_AGC, Nesterov momentum 0.9, weight decay 2e-5, clip_factor 0.02, eps 0.1",
            "learning_rate": f"{LEARNING_RATE}, warm-up over a tenth of the steps, cosine to 0",
            "batch_size": transfer.BATCH,
            "steps": options.steps,
            "label_smoothing": 0.1,
            "stochastic_depth_rate": 0.1,
            "augmentation": "shift by up to a tenth of the side, MixUp 0.2",
        },
        "accuracy": {"images": len(old.test), "top1": round(trainer.accuracy(old.test), 4)},
        "transfer": measure(trainer, new),
        "versions": {name: version(name) for name in ("tensorflow", "keras", "numpy")},
    }
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def measure(trainer: transfer.Trainer, new: data.ImageSet) -> dict:
    """Fine-tunes the trained network, and a fresh one, on few images of new classes; returns accuracies."""
    starts = {"fine-tuned": transfer.values(nfk.replace_head(trainer.model, transfer.CLASSES)), "from scratch": None}
    found = {}
    for way, start in starts.items():
        accuracies = []
        for seed in range(SEEDS):
            few, _ = transfer.draw(new.train, SHOTS, seed)
            keras.utils.set_random_seed(seed)
            first = start or transfer.values(transfer.network())
            trainer.train(first, few, FEW_STEPS, LEARNING_RATE, seed)
            accuracies.append(round(trainer.accuracy(new.test), 4))
        found[way] = {"top1": accuracies, "mean": round(statistics.mean(accuracies), 4)}
    about = {"data": new.name, "images_a_class": SHOTS, "steps": FEW_STEPS, "held_out_images": len(new.test)}
    return {**about, **found}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
