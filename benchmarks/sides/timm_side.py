"""The side of timm, on PyTorch."""

import numpy as np

from benchmarks.sides import Way
from benchmarks.sides.serving import MatrixProduct, Side, serve
from benchmarks.sides.torchvision_code import load_torchvision


def _way(name: str, compiled: bool, channels_last: bool, precision: str = "float32", **options) -> Way:
    layout = "channels last" if channels_last else "NCHW"
    given = {"compiled": compiled, "channels_last": channels_last, "precision": precision, **options}
    title = f"timm, {'compiled' if compiled else 'eager'}, {layout}{name}"
    return Way(title, "benchmarks.sides.timm_side", "timm", given, precision=precision)


def inference_ways() -> list[Way]:
    """The ways of timm to run a network: eager and compiled, in both layouts, and in bfloat16."""
    ways = [_way("", compiled, last) for compiled in (False, True) for last in (False, True)]
    return [*ways, _way(", bfloat16", False, True, "bfloat16")]


def training_ways() -> list[Way]:
    """The ways of timm to take a training step, with and without its AGC."""
    ways = [_way(", AGC", compiled, last, agc=True) for compiled in (False, True) for last in (False, True)]
    return [*ways, _way(", no AGC", False, True, agc=False)]


def _versions() -> dict[str, str]:
    import timm
    import torch

    return {"timm": timm.__version__, "torch": torch.__version__}


class TimmSide(Side):
    """A network of timm, and a way to run or to train it."""

    def __init__(self, request: dict):
        self._library = load_torchvision()
        import timm
        import torch
        from safetensors.torch import load_file

        self.torch, self.versions = torch, _versions()
        self.device = "cuda" if request["device"] == "gpu" else "cpu"
        model = timm.create_model(request["model"].removeprefix("timm_"), num_classes=request["classes"])
        model.load_state_dict(load_file(request["weights"]))
        self.dtype = torch.bfloat16 if request["precision"] == "bfloat16" else torch.float32
        self.layout = torch.channels_last if request["channels_last"] else torch.contiguous_format
        self.model = model.to(self.device, self.dtype, memory_format=self.layout)
        self.compiled = request["compiled"]

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        images = self.torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.images = images.to(self.device, self.dtype, memory_format=self.layout)
        self.labels = self.torch.from_numpy(labels).to(self.device)

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


class Inference(TimmSide):
    """The network's logits."""

    def __init__(self, request: dict):
        super().__init__(request)
        self.model.eval()
        self.call = self.torch.compile(self.model, dynamic=False) if self.compiled else self.model

    def run(self) -> None:
        # Compiled code keeps `no_grad`; what runs fastest for each is used.
        with self.torch.no_grad() if self.compiled else self.torch.inference_mode():
            self.result = self.call(self.images)
        self.wait()

    def outputs(self) -> np.ndarray:
        self.run()
        return self.result.float().cpu().numpy()


class Training(TimmSide):
    """One training step: cross-entropy, gradients, AGC, SGD with Nesterov momentum."""

    def __init__(self, request: dict):
        super().__init__(request)
        from timm.models import model_parameters
        from timm.utils.agc import adaptive_clip_grad

        self.model.train()
        self.call = self.torch.compile(self.model, dynamic=False) if self.compiled else self.model
        self.clip = adaptive_clip_grad if request["agc"] else None
        self.clipped = list(model_parameters(self.model, exclude_head=True))
        self.optimizer = self.torch.optim.SGD(
            self.model.parameters(), lr=request["learning_rate"], momentum=0.9, nesterov=True
        )
        self.losses = []

    def run(self) -> None:
        loss = self.torch.nn.functional.cross_entropy(self.call(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            self.clip(self.clipped, clip_factor=0.01, eps=1e-3)
        self.optimizer.step()
        self.losses.append(loss.detach())
        self.wait()

    def outputs(self) -> np.ndarray:
        return np.array([float(loss) for loss in self.losses[:3]])


def _matrix_product(request: dict) -> Side:
    import torch

    device = "cuda" if request["device"] == "gpu" else "cpu"
    dtype = getattr(torch, request["precision"])
    a, b = (torch.randn(request["size"], request["size"], device=device).to(dtype) for _ in range(2))

    def run():
        with torch.inference_mode():
            torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return MatrixProduct(run, {"torch": torch.__version__})


def prepare(request: dict) -> Side:
    """Makes the side that a request asks for."""
    return {"inference": Inference, "training": Training, "matrix": _matrix_product}[request["kind"]](request)


if __name__ == "__main__":
    serve(prepare)
