"""A head of one's own on a normalizer-free backbone, trained with adaptive gradient clipping.

    python examples/own_head.py

The backbone is the small NFNet, the images are the digits that come with scikit-learn; with pretrained weights and your
own images the lines are the same. Runs in about a minute on two cores.
"""

import keras

import nfnet_keras as nfk
from nfnet_keras import data


def main(epochs: int = 12) -> float:
    """Trains, prints and returns the accuracy on the held-out digits."""
    keras.utils.set_random_seed(0)
    digits = data.digits()

    backbone = nfk.create_model("nfnet_tiny", weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3))
    hidden = keras.layers.Dense(64, activation="relu")(backbone.output)
    outputs = keras.layers.Dense(10, activation="softmax", name="predictions")(hidden)
    # A NormalizerFreeModel, not a keras.Model: its training step clips. (A plain one needs nfk.optimizers.AGC.)
    model = nfk.NormalizerFreeModel(backbone.input, outputs)

    steps = data.steps_per_epoch(digits.train, 64)
    schedule = nfk.optimizers.warmup_cosine(0.2, total_steps=epochs * steps, warmup_steps=steps)
    # From scratch, so few steps open the residual branches only with a floor (`eps`) above the paper's 1e-3. With
    # pretrained weights `clip_factor=0.02` as an argument of `compile` is enough.
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
    optimizer = nfk.optimizers.AGC(optimizer, clip_factor=0.02, eps=0.1)
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    augment = data.Augment(flip=False, min_area=1.0, shift=0.1)
    batches = data.training_batches(digits.train, 10, 32, 64, augment, seed=0)
    model.fit(batches, epochs=epochs, steps_per_epoch=steps, shuffle=False)

    held_out = data.evaluation_batches(digits.test, 10, 32, 64)
    accuracy = model.evaluate(held_out, verbose=0, return_dict=True)["accuracy"]
    print(f"Accuracy on {len(digits.test)} held-out digits: {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
