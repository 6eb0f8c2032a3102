"""Where images come from and what is done to them before a network sees them.

Sources (`open_images`; `digits`, `image_folder`) give an `ImageSet` of two splits, each a `Split` or `Records`;
`training_batches` and `evaluation_batches` turn a split into a `tf.data.Dataset`. TensorFlow does this work under every
Keras backend, and is imported only once a function needs it.
"""

from nfnet_keras.data.augment import Augment
from nfnet_keras.data.batches import evaluation_batches, steps_per_epoch, training_batches
from nfnet_keras.data.broken import BrokenImages
from nfnet_keras.data.errors import DataError
from nfnet_keras.data.evaluation import Preprocessing, evaluation_crop, load_for, load_image
from nfnet_keras.data.folder import image_folder
from nfnet_keras.data.handwritten import digits
from nfnet_keras.data.images import MEAN_RGB, STDDEV_RGB, normalize
from nfnet_keras.data.records import Records
from nfnet_keras.data.sources import open_images
from nfnet_keras.data.splits import ImageSet, Split, check_labels

__all__ = [
    "MEAN_RGB",
    "STDDEV_RGB",
    "Augment",
    "BrokenImages",
    "DataError",
    "ImageSet",
    "Preprocessing",
    "Records",
    "Split",
    "check_labels",
    "digits",
    "evaluation_batches",
    "evaluation_crop",
    "image_folder",
    "load_for",
    "load_image",
    "normalize",
    "open_images",
    "steps_per_epoch",
    "training_batches",
]
