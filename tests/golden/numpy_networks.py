"""The authors' small networks as a plain NumPy program, with what their `return_metrics` measures on the way.

It knows nothing of this package. That it computes the right function is seen by its logits, which are the reference's.
"""

import dataclasses

import numpy as np


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "gelu": lambda x: 1.7015043497085571 * 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: 1.7139588594436646 * np.maximum(x, 0),
    "silu": lambda x: 1.7881293296813965 * x * _sigmoid(x),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A small network: its family's name for modules and blocks, depths, activation, alpha."""

    module: str
    block: str
    depths: tuple
    activation: str
    alpha: float = 0.2


NETWORKS = {
    "nfnet": Network("NFNet", "nf_block", (1, 2, 2, 1), "gelu"),
    "nfnet_relu_nose_onconv": Network("NFNet", "nf_block", (1, 2, 2, 1), "relu", 0.3),
    "nf_regnet": Network("NF_RegNet", "nf_block", (1, 1, 2, 1), "silu"),
    "nf_resnet": Network("NF_ResNet", "nf_res_block", (1, 1, 2, 1), "relu"),
    "nf_seresnet": Network("NF_ResNet", "nf_res_block", (1, 1, 2, 1), "silu"),
}


def _windows(x, size, stride, fill):
    """Windows of (N, H, W, C) under padding "SAME": (N, H', W', C, size, size)."""
    pads = []
    for n in x.shape[1:3]:
        total = max((-(-n // stride) - 1) * stride + size - n, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def conv(x, parameters, stride=1):
    """A convolution with scaled weight standardization, in as many groups as the kernel's shape says."""
    w = parameters["w"].astype(np.float64)
    fan_in = np.prod(w.shape[:-1])
    w = (w - w.mean((0, 1, 2))) / np.sqrt(np.maximum(w.var((0, 1, 2)) * fan_in, 1e-4)) * parameters["gain"]
    groups = x.shape[-1] // w.shape[2]
    windows = _windows(x, w.shape[0], stride, 0.0)
    parts = zip(np.split(windows, groups, 3), np.split(w, groups, 3), strict=True)
    return (
        np.concatenate([np.einsum("nhwcij,ijco->nhwo", a, b, optimize=True) for a, b in parts], -1) + parameters["bias"]
    )


def signal_metrics(x, i) -> dict:
    """What is measured at depth `i`."""
    return {f"avg_sq_mean_{i}": np.mean(x.mean((0, 1, 2)) ** 2), f"avg_var_{i}": np.mean(x.var((0, 1, 2)))}


def run(name: str, tree: dict, x: np.ndarray) -> dict:
    """Runs a network of `NETWORKS` with the parameters of a tree {module: {parameter: array}}.

    Returns:
        `logits`, and the metrics under the authors' names.
    """
    network = NETWORKS[name]
    act, top = ACTIVATIONS[network.activation], f"{network.module}/~/"
    x = x.astype(np.float64)
    if network.module == "NFNet":
        for i, stride in enumerate((2, 1, 1, 2)):
            x = conv(act(x) if i else x, tree[f"{top}stem_conv{i}"], stride)
    else:
        x = conv(x, tree[f"{top}initial_conv"], 2)
    if network.module == "NF_ResNet":
        x = _windows(x, 3, 2, -np.inf).max((-1, -2))
    found = signal_metrics(x, 0)
    index, variance = 0, 1.0
    for stage, depth in enumerate(network.depths):
        for block in range(depth):
            stride = 2 if block == 0 and (stage or network.module == "NF_RegNet") else 1
            prefix = f"{top}{network.block}" + (f"_{index}" if index else "")
            x, branch = _block(x, tree, prefix, network, stride, variance)
            found |= {f"res_avg_var_{index}": np.mean(branch.var((0, 1, 2))), **signal_metrics(x, index + 1)}
            variance = (1.0 if block == 0 else variance) + network.alpha**2
            index += 1
    if f"{top}final_conv" in tree:
        x = conv(x, tree[f"{top}final_conv"])
    linear = tree[f"{top}linear"]
    return {**found, "logits": act(x).mean((1, 2)) @ linear["w"] + linear["b"]}


def _block(x, tree, prefix, network, stride, variance):
    act = ACTIVATIONS[network.activation]

    def own(part):
        return tree.get(f"{prefix}/~/{part}")

    def excited(y):
        if own("squeeze_excite/~/linear") is None:
            return y
        first, second = own("squeeze_excite/~/linear"), own("squeeze_excite/~/linear_1")
        hidden = np.maximum(y.mean((1, 2)) @ first["w"] + first["b"], 0)
        return 2 * _sigmoid(hidden @ second["w"] + second["b"])[:, None, None] * y

    out = act(x) / np.sqrt(variance)
    shortcut = x
    if own("conv_shortcut") is not None:
        if network.module == "NF_ResNet":
            shortcut = conv(out, own("conv_shortcut"), stride)
        else:
            pooled = _windows(out, 2, 2, 0.0).mean((-1, -2)) if stride > 1 else out
            shortcut = conv(pooled, own("conv_shortcut"))
    out = conv(act(conv(out, own("conv0"))), own("conv1"), stride)
    if own("conv1b") is not None:
        out = conv(act(out), own("conv1b"))
    if network.module == "NF_RegNet":
        out = conv(act(excited(out)), own("conv2"))
    else:
        out = excited(conv(act(out), own("conv2")))
    return shortcut + network.alpha * tree[prefix]["skip_gain"] * out, out
