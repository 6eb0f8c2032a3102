"""The side of the authors' own program (google-deepmind/deepmind-research, folder nfnets), on JAX and Haiku.

Their files are not on a registry: the environment variable NFNET_AUTHORS names a checkout of the repository.
"""

import os
import re
import sys

import numpy as np

from benchmarks.sides import Way, need_device
from benchmarks.sides.serving import Side, serve

_BLOCK = {
    "conv1": "~/conv0",
    "conv2": "~/conv1",
    "conv2b": "~/conv1b",
    "conv3": "~/conv2",
    "downsample.conv": "~/conv_shortcut",
    "attn_last.fc1": "~/squeeze_excite/~/linear",
    "attn_last.fc2": "~/squeeze_excite/~/linear_1",
}


def inference_ways(model: str) -> list[Way]:
    """The ways of the authors' program to run a network: compiled as a whole.

    Args:
        model: timm's name of the network with "timm_" before it.

    Returns:
        The ways; none if the network is not the authors'.
    """
    return [_way("authors, jit", {})] if re.fullmatch(r"timm_dm_nfnet_f\d", model) else []


def training_ways(model: str) -> list[Way]:
    """The ways of the authors' program to take a training step, with and without AGC."""
    if not inference_ways(model):
        return []
    return [_way("authors, jit, AGC", {"agc": True}), _way("authors, jit, no AGC", {"agc": False})]


def _way(name: str, options: dict) -> Way:
    return Way(name, "benchmarks.sides.authors_side", "authors", options, arithmetic="authors")


def haiku_name(name: str, depths: list[int]) -> tuple[str, str]:
    """Finds where a parameter of timm's is in the authors' tree.

    Args:
        name: Key of timm's state dictionary.
        depths: Blocks of each stage.

    Returns:
        (module, parameter).
    """
    inner, _, parameter = name.rpartition(".")
    dense = "attn_last" in name or inner == "head.fc"
    parameter = {"weight": "w", "bias": "b" if dense else "bias"}.get(parameter, parameter)
    if found := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", name):
        index = sum(depths[: int(found[1])]) + int(found[2])
        block = f"NFNet/~/nf_block{f'_{index}' if index else ''}"
        inner = found[3].rpartition(".")[0]
        return (f"{block}/{_BLOCK[inner]}", parameter) if inner else (block, "skip_gain")
    if found := re.fullmatch(r"stem\.conv(\d)", inner):
        return f"NFNet/~/stem_conv{int(found[1]) - 1}", parameter
    return {"final_conv": "NFNet/~/final_conv", "head.fc": "NFNet/~/linear"}[inner], parameter


def _from_timm(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) < 2:
        return array.reshape(shape)
    return array.transpose(*range(2, array.ndim), 1, 0).reshape(shape)


class AuthorsSide(Side):
    """A network of the authors'."""

    def __init__(self, request: dict):
        checkout = os.environ["NFNET_AUTHORS"]
        if not os.path.isfile(os.path.join(checkout, "nfnets", "nfnet.py")):
            raise ValueError(f"{checkout} is no checkout of deepmind-research: it has no nfnets/nfnet.py")
        sys.path.insert(0, checkout)
        import haiku as hk
        import jax
        from nfnets import nfnet
        from safetensors.numpy import load_file

        need_device(request["device"], "jax")
        self.jax = jax
        self.versions = {"jax": jax.__version__, "dm-haiku": hk.__version__}
        variant = "F" + request["model"][-1]
        size = request["size"]

        def forward(images, is_training):
            network = nfnet.NFNet(request["classes"], variant=variant, drop_rate=0.0, stochdepth_rate=0.0)
            return network(images, is_training=is_training)["logits"]

        self.network = hk.transform(forward)
        images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        shapes = jax.eval_shape(lambda key, x: self.network.init(key, x, True), jax.random.PRNGKey(0), images)
        self.parameters = self._load(load_file(request["weights"]), shapes, nfnet.NFNet.variant_dict[variant]["depth"])

    def _load(self, arrays: dict[str, np.ndarray], shapes: dict, depths: list[int]) -> dict:
        tree: dict[str, dict] = {}
        for name, array in arrays.items():
            module, parameter = haiku_name(name, depths)
            shape = shapes[module][parameter].shape
            tree.setdefault(module, {})[parameter] = self.jax.numpy.asarray(_from_timm(array, shape))
        count, wanted = (sum(len(module) for module in each.values()) for each in (tree, shapes))
        if count != wanted:
            raise ValueError(f"{wanted} parameters of the authors' network, {count} in the file")
        return tree

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = self.jax.numpy.asarray(images), self.jax.numpy.asarray(labels)


class Inference(AuthorsSide):
    """The network's logits."""

    def __init__(self, request: dict):
        super().__init__(request)
        self.call = self.jax.jit(lambda tree, images: self.network.apply(tree, None, images, False))

    def run(self) -> None:
        self.result = self.jax.block_until_ready(self.call(self.parameters, self.images))

    def outputs(self) -> np.ndarray:
        self.run()
        return np.asarray(self.result)


class Training(AuthorsSide):
    """One training step: cross-entropy, gradients and the authors' SGD_AGC."""

    def __init__(self, request: dict):
        super().__init__(request)
        from nfnets import optim

        jax = self.jax
        head = {"NFNet/~/linear": {"w": self.parameters["NFNet/~/linear"]["w"]}}
        rest = {
            module: {name: value for name, value in values.items() if (module, name) != ("NFNet/~/linear", "w")}
            for module, values in self.parameters.items()
        }
        clipping = 0.01 if request["agc"] else None
        self.optimizer = optim.SGD_AGC(
            [{"params": rest}, {"params": head, "clipping": None}],
            lr=request["learning_rate"],
            momentum=0.9,
            nesterov=True,
            clipping=clipping,
            eps=1e-3,
        )
        self.states = self.optimizer.states()

        def loss_of(tree, images, labels):
            logits = self.network.apply(tree, None, images, True)
            chosen = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
            return -chosen.mean()

        def step(tree, states, images, labels):
            loss, gradients = jax.value_and_grad(loss_of)(tree, images, labels)
            return loss, *self.optimizer.step(tree, gradients, states)

        self.call = jax.jit(step, donate_argnums=(0, 1))
        self.losses = []

    def run(self) -> None:
        loss, self.parameters, self.states = self.jax.block_until_ready(
            self.call(self.parameters, self.states, self.images, self.labels)
        )
        self.losses.append(float(loss))

    def outputs(self) -> np.ndarray:
        return np.array(self.losses[:3])


def prepare(request: dict) -> Side:
    """Makes the side that a request asks for."""
    return {"inference": Inference, "training": Training}[request["kind"]](request)


if __name__ == "__main__":
    serve(prepare)
