"""Normalizer-free networks (NFNets) for Keras: exact, with adaptive gradient clipping in every training step."""

# isort: off
from nfnet_keras import _startup  # noqa: F401 (first: it must come before Keras)

# isort: on
from nfnet_keras import applications, checkpoints, distribution, layers, optimizers
from nfnet_keras.applications import create_model, list_models, replace_head
from nfnet_keras.applications.nf_regnet import (
    NFRegNetB0,
    NFRegNetB1,
    NFRegNetB2,
    NFRegNetB3,
    NFRegNetB4,
    NFRegNetB5,
    NFRegNetB6,
    NFRegNetB7,
    NFRegNetB8,
)
from nfnet_keras.applications.nf_resnet import (
    NFResNet50,
    NFResNet101,
    NFResNet152,
    NFResNet200,
    NFResNet288,
    NFResNet600,
)
from nfnet_keras.applications.nfnet import (
    NFNetF0,
    NFNetF0Plus,
    NFNetF1,
    NFNetF1Plus,
    NFNetF2,
    NFNetF2Plus,
    NFNetF3,
    NFNetF3Plus,
    NFNetF4,
    NFNetF4Plus,
    NFNetF5,
    NFNetF5Plus,
    NFNetF6,
    NFNetF6Plus,
    NFNetF7,
    NFNetF7Plus,
    NFNetTiny,
)
from nfnet_keras.applications.timm import ECANFNetL0, ECANFNetL1, ECANFNetL2, ECANFNetL3, NFNetL0
from nfnet_keras.complexity import multiply_adds
from nfnet_keras.diagnostics.explaining import grad_cam, overlay_heatmap
from nfnet_keras.diagnostics.signals import SignalPropagation, plot_signals, signal_propagation
from nfnet_keras.exporting import export
from nfnet_keras.folding import fold_weight_standardization
from nfnet_keras.inference import Predictor
from nfnet_keras.model import NormalizerFreeModel
from nfnet_keras.sam import SAM
from nfnet_keras.version import __version__

__all__ = [
    "SAM",
    "ECANFNetL0",
    "ECANFNetL1",
    "ECANFNetL2",
    "ECANFNetL3",
    "NFNetF0",
    "NFNetF0Plus",
    "NFNetF1",
    "NFNetF1Plus",
    "NFNetF2",
    "NFNetF2Plus",
    "NFNetF3",
    "NFNetF3Plus",
    "NFNetF4",
    "NFNetF4Plus",
    "NFNetF5",
    "NFNetF5Plus",
    "NFNetF6",
    "NFNetF6Plus",
    "NFNetF7",
    "NFNetF7Plus",
    "NFNetL0",
    "NFNetTiny",
    "NFRegNetB0",
    "NFRegNetB1",
    "NFRegNetB2",
    "NFRegNetB3",
    "NFRegNetB4",
    "NFRegNetB5",
    "NFRegNetB6",
    "NFRegNetB7",
    "NFRegNetB8",
    "NFResNet50",
    "NFResNet101",
    "NFResNet152",
    "NFResNet200",
    "NFResNet288",
    "NFResNet600",
    "NormalizerFreeModel",
    "Predictor",
    "SignalPropagation",
    "__version__",
    "applications",
    "checkpoints",
    "create_model",
    "distribution",
    "export",
    "fold_weight_standardization",
    "grad_cam",
    "layers",
    "list_models",
    "multiply_adds",
    "optimizers",
    "overlay_heatmap",
    "plot_signals",
    "replace_head",
    "signal_propagation",
]
