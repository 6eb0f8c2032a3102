"""What goes wrong in a run, said to the person who started it."""


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message is one line that says why and what to do.

    Example:

    >>> raise TrainingError("the loss is not a number; lower --learning-rate")
    Traceback (most recent call last):
    ...
    nfnet_keras.training.errors.TrainingError: the loss is not a number; lower --learning-rate
    """
