"""The small networks that `golden_models.npz` has numbers of, with the options they were built with."""

from nfnet_keras.applications.nf_regnet import NFRegNet, NFRegNetVariant
from nfnet_keras.applications.nf_resnet import NFResNet, NFResNetVariant

SMALL = {
    "nfnet": {},
    "nfnet_relu_nose_onconv": {
        "activation": "relu",
        "se_ratio": 0.25,
        "use_two_convs": False,
        "alpha": 0.3,
        "final_conv_mult": 1,
    },
    "nf_regnet": {},
    "nf_resnet": {},
    "nf_seresnet": {"use_se": True, "activation": "silu"},
}


def small(name: str, small_nfnet, **options):
    """Builds one of them, logits, stochastic depth off; `small_nfnet` is the fixture."""
    defaults = {"classes": 10, "classifier_activation": None, "stochastic_depth_rate": 0.0, "weights": None}
    options = {**defaults, **SMALL[name], **options}
    if name.startswith("nfnet"):
        return small_nfnet(**options)
    if name == "nf_regnet":
        return NFRegNet(NFRegNetVariant("s", (16, 24, 32, 40), (1, 1, 2, 1), 0.0, 32, 32, width=1), **options)
    return NFResNet(NFResNetVariant("s", (1, 1, 2, 1), 0.0, 32, 32, width=1), **options)
