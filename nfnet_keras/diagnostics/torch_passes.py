"""What `passes.py` promises, on PyTorch."""

from collections.abc import Callable, Sequence

import keras


def forward(function: Callable, variables: Sequence, changed: Sequence) -> Callable:
    """As in `passes.py`."""
    import torch

    def run(*tensors):
        with torch.no_grad(), keras.StatelessScope(state_mapping=list(changed)):
            return function(*tensors)

    return run


def backward(function: Callable, variables: Sequence) -> Callable:
    """As in `passes.py`."""
    import torch

    def run(*tensors):
        kept = []

        def at(value):
            # What comes before needs no gradient, and so keeps nothing for one.
            torch.set_grad_enabled(True)
            kept.append(value.detach().requires_grad_())
            return kept[0]

        with torch.no_grad(), keras.StatelessScope():
            number = function(at, *tensors)
        if not number.requires_grad:
            return kept[0], None
        (gradient,) = torch.autograd.grad(number, kept, allow_unused=True)
        return kept[0].detach(), gradient

    return run
