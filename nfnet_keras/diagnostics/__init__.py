"""Looking inside of a network: how its signal propagates, and what a prediction rests on."""

from nfnet_keras.diagnostics.explaining import grad_cam, overlay_heatmap, plot_explanations
from nfnet_keras.diagnostics.signals import SignalPropagation, SignalRow, plot_signals, signal_propagation

__all__ = [
    "SignalPropagation",
    "SignalRow",
    "grad_cam",
    "overlay_heatmap",
    "plot_explanations",
    "plot_signals",
    "signal_propagation",
]
