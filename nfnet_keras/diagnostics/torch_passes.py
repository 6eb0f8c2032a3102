"""A network run forwards and backwards on PyTorch, outside of training; as in `tensorflow_passes.py`."""

from collections.abc import Callable, Sequence

import keras


def forward(function: Callable, variables: Sequence, changed: Sequence) -> Callable:
    """Makes a function run without gradients, and without changing a variable.

    Args:
        function: Takes tensors and returns a structure of tensors.
        variables: The variables that it may read.
        changed: Pairs of a variable and the value that it is taken to have.

    Returns:
        A function of the same tensors.
    """
    import torch

    def run(*tensors):
        with torch.no_grad(), keras.StatelessScope(state_mapping=list(changed)):
            return function(*tensors)

    return run


def backward(function: Callable, variables: Sequence) -> Callable:
    """Makes a function give the gradient of a number by a value inside of it.

    Args:
        function: Takes a function `at` and tensors. It calls `at(value)` once, goes on with what that returns, and
            returns a number and a further structure of tensors.
        variables: The variables that it may read.

    Returns:
        A function of the same tensors that returns the value, the gradient (`None` where the number does not depend on
        the value) and the further structure.
    """
    import torch

    def run(*tensors):
        kept = []

        def at(value):
            # What comes before needs no gradient, and so keeps nothing for one.
            torch.set_grad_enabled(True)
            kept.append(value.detach().requires_grad_())
            return kept[0]

        with torch.no_grad(), keras.StatelessScope():
            number, further = function(at, *tensors)
        if not number.requires_grad:
            return kept[0], None, further
        (gradient,) = torch.autograd.grad(number, kept, allow_unused=True)
        return kept[0].detach(), gradient, keras.tree.map_structure(lambda x: x.detach(), further)

    return run
