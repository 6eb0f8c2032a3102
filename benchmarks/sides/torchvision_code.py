"""torchvision's Python code, where its compiled operations do not fit the PyTorch that is installed."""

import sys


def load_torchvision() -> object | None:
    """Makes torchvision importable.

    Package indexes have it for CUDA only; beside a PyTorch for CPUs the import ends at the missing operation `nms`,
    which no network of timm and no transform uses. Declaring it is enough.

    Returns:
        What has to be kept for as long as torchvision is used; `None` where its operations load.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError as problem:
        if "torchvision::nms" not in str(problem):
            raise
    else:
        return None
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
