"""Trains a network with the paper's recipe at a small scale: adaptive gradient clipping, warm-up and cosine, moving
average of the weights, label smoothing, MixUp.

Without flags it trains the small NFNet on the embedded set, scikit-learn's handwritten digits. With --data it trains
on a folder that has a folder of JPEG or PNG images for each class; a fifth of each class is held out, or the folders
train/ and test/ are used where they exist. The run's folder then holds model.keras, metrics.json, metrics.csv and
curves.png. Ctrl-C stops after the step in flight and keeps what was learnt; --resume goes on from there.
"""

import math
import os
import signal
import sys

from absl import flags


def define_flags() -> flags.FlagValues:
    """Returns the flags of `nfnet train`."""
    values = flags.FlagValues()
    options = {"flag_values": values}
    flags.DEFINE_string("model", None, "network to train, such as nfnet_tiny (the default) or nfnet_f0", **options)
    flags.DEFINE_string(
        "data", None, "folder of class folders of JPEG and PNG files; without it, the digits", **options
    )
    flags.DEFINE_integer("epochs", None, "passes over the training images", **options)
    flags.DEFINE_integer("batch_size", None, "images a step", **options)
    flags.DEFINE_integer("image_size", None, "side of the images in pixels", **options)
    flags.DEFINE_float("learning_rate", None, "peak learning rate at this batch size", **options)
    flags.DEFINE_float("clip_factor", None, "AGC's largest ratio of gradient norm to weight norm", **options)
    flags.DEFINE_integer("seed", None, "seed of everything random (0)", **options)
    flags.DEFINE_string("out", None, "folder of the run; without it, a new one in runs/", **options)
    flags.DEFINE_boolean("resume", False, "go on with the run in --out, with its own settings", **options)
    # The dashes that people type as well as the underscores of absl.
    for name in ("batch_size", "image_size", "learning_rate", "clip_factor"):
        flags.DEFINE_alias(name.replace("_", "-"), name, flag_values=values)
    return values


def run(values: flags.FlagValues) -> int:
    """Runs `nfnet train` and returns its exit status."""
    from nfnet_keras.training import run as training

    if values.resume:
        config = _resumed(values)
        out = values.out
    else:
        config = training.settings(values.model or training.TINY, values.data, seed=values.seed or 0, **_given(values))
        out = values.out or training.default_out(config)
    try:
        metrics = training.train(config, out, resume=values.resume, verbose=1)
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            raise
        print(f"\nStopped; what was learnt is in {out}. Go on with: nfnet train --resume --out={out}", file=sys.stderr)
        return 128 + int(interrupt.args[0] or signal.SIGINT)
    print(
        f"Test accuracy {metrics['test_accuracy']:.4f} on {metrics['test_images']} held-out images; model, metrics and "
        f"curves are in {out}"
    )
    return 0


def _given(values: flags.FlagValues) -> dict:
    names = ("epochs", "batch_size", "image_size", "learning_rate", "clip_factor")
    return {name: values[name].value for name in names if values[name].value is not None}


def _resumed(values: flags.FlagValues):
    """Returns the settings of the run in --out; a flag that says otherwise is refused."""
    from nfnet_keras.training import run as training
    from nfnet_keras.training.run_folder import RunFolder

    if not values.out:
        raise ValueError("--resume needs --out, the folder of the run to go on with")
    config = training.Settings.from_dict(RunFolder(values.out).read_config())
    recipe = config.recipe
    data = values.data if values.data is None else os.path.abspath(values.data)
    asked = {"model": values.model, "data": data, "seed": values.seed, **_given(values)}
    has = {"model": config.model, "data": config.data, "seed": config.seed, "learning_rate": recipe.peak_learning_rate}
    for name, new in asked.items():
        old = has[name] if name in has else getattr(recipe, name)
        same = math.isclose(old, new) if isinstance(new, float) else old == new
        if new is not None and not same:
            raise ValueError(
                f"the run in {values.out!r} has {name} {old}, not {new}; leave the flag out to go on with it, or start "
                "a new run in another folder"
            )
    return config
