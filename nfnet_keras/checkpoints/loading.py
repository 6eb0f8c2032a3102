"""From a checkpoint of any format into a model: names matched, shapes checked, first kernel and head adapted."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from nfnet_keras.checkpoints.names import Naming, from_stored, is_own, own_variables, stored_shape
from nfnet_keras.checkpoints.stem import adapt_stem
from nfnet_keras.checkpoints.stored import Checkpoint, CheckpointError, StoredArray

HEAD = ("predictions/kernel", "predictions/bias")
STEM = ("stem_conv0/kernel", "stem_conv0/gain")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What came of loading a checkpoint.

    Args:
        parameters: How many parameters were set, as arrays.
        head: Whether the classifier was set.
        file_classes: Classes of the file's classifier, or `None`.
        adapted_channels: Channels of the input that the first kernel was adapted to, or `None`.

    Example:

    >>> Loaded(parameters=8, head=False, file_classes=10, adapted_channels=None).head
    False
    """

    parameters: int
    head: bool
    file_classes: int | None
    adapted_channels: int | None


def load_checkpoint(
    model: keras.Model, checkpoint: Checkpoint, explain: Callable[[Checkpoint], str] | None = None
) -> Loaded:
    """Sets the parameters of a model from a checkpoint.

    Everything must be there, fit and be finite; names and shapes are checked before anything is set. Exceptions: a
    classifier for another number of classes is left as it is in the model, a model without one leaves the file's out,
    and a first kernel for three channels is adapted to other inputs (`nfnet_keras.checkpoints.stem`).

    Args:
        model: A network of this package; layers that a user put before or behind it are left alone.
        checkpoint: From `open_checkpoint`.
        explain: Says of a checkpoint that does not fit what network it is for, for the message. Defaults to `None`.

    Returns:
        What was done.

    Raises:
        CheckpointError: If a parameter is missing, unknown, of another shape or not finite; the message names it.

    Example:

    >>> import nfnet_keras as nfk
    >>> from nfnet_keras.checkpoints.formats import open_checkpoint
    >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=10)
    >>> model.save_weights("digits.weights.h5")
    >>> other = nfk.create_model("nfnet_tiny", weights=None, classes=7)
    >>> load_checkpoint(other, open_checkpoint("digits.weights.h5")).head
    False
    """
    plan = _Plan(model, checkpoint)
    problem = plan.problem()
    if problem:
        hint = (explain and explain(checkpoint)) or ""
        raise CheckpointError(
            f"{checkpoint.path!r} does not fit the model '{model.name}': {problem}{hint and ' '}{hint}"
        )
    for path, variable in plan.variables.items():
        if path not in plan.pairs or path in plan.stem:
            continue
        variable.assign(plan.read(path))
    for path, array in plan.adapted().items():
        plan.variables[path].assign(array)
    head = HEAD[0] in plan.pairs
    return Loaded(len(plan.pairs), head, plan.file_classes, plan.channels)


class _Plan:
    """Which array of a file belongs to which variable of a model."""

    def __init__(self, model: keras.Model, checkpoint: Checkpoint):
        self.model, self.checkpoint, self.format = model, checkpoint, checkpoint.format
        self.naming = Naming.of(model)
        self.variables = own_variables(model)
        self.left: dict[str, str] = {}
        self.twice: list[tuple[str, str]] = []
        for name in checkpoint.arrays:
            first = self.left.setdefault(_plain(self.format, name), name)
            if first is not name:
                self.twice.append((first, name))
        self.pairs: dict[str, tuple[str, StoredArray]] = {}
        self.missing: list[str] = []
        for path in self.variables:
            name = self.left.pop(_plain(self.format, self.naming.name(self.format, path)), None)
            if name is None:
                self.missing.append(path)
            else:
                self.pairs[path] = (name, checkpoint.arrays[name])
        self.file_classes = self._classes()
        self.channels = self._other_channels()
        self.stem = STEM if self.channels else ()
        self._leave_head()

    def _classes(self) -> int | None:
        """Classes of the file's classifier."""
        if HEAD[1] in self.pairs:
            found = self.pairs[HEAD[1]][1]
        else:
            found = self.checkpoint.arrays.get(self.left.get(_plain(self.format, self._name(HEAD[1])), ""))
        return found.shape[0] if found is not None and len(found.shape) == 1 else None

    def _leave_head(self) -> None:
        """Leaves the classifier out where the model or the file has none, or another number of classes."""
        if HEAD[0] not in self.variables:
            for path in HEAD:
                self.left.pop(_plain(self.format, self._name(path)), None)
        elif self.file_classes is None and set(HEAD) <= set(self.missing):
            self.missing = [path for path in self.missing if path not in HEAD]
        elif self.file_classes not in (None, self.variables[HEAD[1]].shape[0]):
            for path in HEAD:
                self.pairs.pop(path, None)

    def _other_channels(self) -> int | None:
        """The model's number of input channels, where the file's first kernel is for three and the model's is not."""
        kernel = self.variables[STEM[0]].shape
        found = self.pairs.get(STEM[0])
        three = stored_shape(self.format, STEM[0], (*kernel[:2], 3, kernel[3]))
        return kernel[2] if found and kernel[2] != 3 and found[1].shape == three else None

    def _name(self, path: str) -> str:
        return self.naming.name(self.format, path)

    def problem(self) -> str:
        """Says what does not fit, or nothing."""
        if self.twice:
            return f"it has both {self.twice[0][0]!r} and {self.twice[0][1]!r}, which are one parameter here."
        if self.missing:
            return f"it lacks the parameter {self._name(self.missing[0])!r}{_others(self.missing)}."
        for path, (name, stored) in self.pairs.items():
            expected = stored_shape(self.format, path, self.variables[path].shape)
            if stored.shape != expected and not (path == STEM[0] and self.channels) and not _scalars(stored, expected):
                return f"the parameter {name!r} has shape {stored.shape}, the model's is {expected}."
        unknown = [name for plain, name in self.left.items() if not self._may_be_left(plain)]
        return f"it has the parameter {unknown[0]!r}{_others(unknown)}, which the model has not." if unknown else ""

    def _may_be_left(self, plain: str) -> bool:
        # A Keras file may hold layers that a user put around the network; a pyramid has no last convolution.
        if self.format == "keras" and not is_own(plain):
            return True
        endless = "final_conv/kernel" not in self.variables and HEAD[0] not in self.variables
        return endless and plain.rpartition("/" if self.format != "timm" else ".")[0].endswith("final_conv")

    def read(self, path: str) -> np.ndarray:
        """Reads the array of a variable, in the variable's shape."""
        name, stored = self.pairs[path]
        # A float64 that is too large becomes infinite, which is said below.
        with np.errstate(over="ignore"):
            array = stored.read().astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{self.checkpoint.path!r}: the parameter {name!r} is not finite ({_count_not_finite(array)})."
            )
        array = from_stored(self.format, path, array)
        return array if path in self.stem else array.reshape(self.variables[path].shape)

    def adapted(self) -> dict[str, np.ndarray]:
        """The first kernel and its gain, for the model's number of channels."""
        if not self.stem:
            return {}
        layer = self.model.get_layer("stem_conv0")
        kernel, gain = adapt_stem(
            self.read(STEM[0]), self.read(STEM[1]), self.channels, layer.epsilon, layer.variance_epsilon
        )
        return {STEM[0]: kernel, STEM[1]: gain}


def _plain(format: str, name: str) -> str:
    """Takes out of a name what differs between files of one format: Haiku's root, timm's two words for attention."""
    if format == "haiku":
        return name.partition("/~/")[2] or name
    return name.replace(".attn_last.", ".attn.") if format == "timm" else name


def _scalars(stored: StoredArray, expected: tuple) -> bool:
    return set(expected) <= {1} and set(stored.shape) <= {1}


def _others(names: list) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def _count_not_finite(array: np.ndarray) -> str:
    nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    return f"{nan} NaN, {infinite} infinite, of {array.size} numbers"
