"""Layers of normalizer-free networks. They run on TensorFlow, JAX and PyTorch."""

from nfnet_keras.layers.activations import ACTIVATION_GAINS, ScaledActivation
from nfnet_keras.layers.channel_attention import EfficientChannelAttention
from nfnet_keras.layers.dropout import Dropout
from nfnet_keras.layers.grouped_conv2d import GroupedConv2D
from nfnet_keras.layers.pooling import SymmetricMaxPooling2D
from nfnet_keras.layers.residual import ResidualAdd, SkipGain, StochasticDepth
from nfnet_keras.layers.squeeze_excite import SqueezeExcite
from nfnet_keras.layers.ws_conv2d import WSConv2D, standardize_kernel

__all__ = [
    "ACTIVATION_GAINS",
    "Dropout",
    "EfficientChannelAttention",
    "GroupedConv2D",
    "ResidualAdd",
    "ScaledActivation",
    "SkipGain",
    "SqueezeExcite",
    "StochasticDepth",
    "SymmetricMaxPooling2D",
    "WSConv2D",
    "standardize_kernel",
]
