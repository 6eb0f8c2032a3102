"""The handwritten digits that come with the package."""

import pathlib

import numpy as np

from nfnet_keras.data.splits import ImageSet, Split, held_out

_HELD_OUT = 360  # a fifth of the 1797 images


def digits() -> ImageSet:
    """Load handwritten digits, the images of scikit-learn's `load_digits`; no network is needed.

    1797 real scans of 8 x 8 pixels with grey values 0..16, rescaled to 0..255 and repeated to
    three channels. The images keep their size. The split is fixed, and stratified by class.

    Source: the test set of Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI
    Machine Learning Repository, 1998, <https://doi.org/10.24432/C50P49>, licence CC BY 4.0.

    Returns:
        The set "digits" of ten classes "0".."9": 1437 images to train on, 360 held out, uint8
        of shape (N, 8, 8, 3).

    Example:
        >>> from nfnet_keras.data import digits
        >>> digits().train.images.shape
        (1437, 8, 8, 3)
    """
    with np.load(pathlib.Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        scans, labels = arrays["images"], arrays["labels"].astype(np.int32)
    grey = np.rint(scans * (255.0 / 16.0)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    test = np.zeros(len(labels), bool)
    for label, count in enumerate(_shares(np.bincount(labels), _HELD_OUT)):
        members = np.flatnonzero(labels == label)
        test[members] = held_out([str(i) for i in members], int(count), seed=0)
    return ImageSet(
        name="digits",
        class_names=tuple(str(i) for i in range(10)),
        train=Split(labels[~test], images=images[~test]),
        test=Split(labels[test], images=images[test]),
    )


def _shares(counts: np.ndarray, total: int) -> np.ndarray:
    """Divide `total` among classes in proportion to `counts`, by largest remainders."""
    exact = counts * total / counts.sum()
    shares = np.floor(exact).astype(int)
    most = np.argsort(shares - exact, kind="stable")[: total - shares.sum()]
    shares[most] += 1
    return shares
