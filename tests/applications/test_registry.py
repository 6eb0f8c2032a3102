"""Models by name."""

import keras
import pytest

import nfnet_keras as nfk
from nfnet_keras.applications.registry import register


def test_patterns():
    assert nfk.list_models("nfnet_f0*") == ["nfnet_f0", "nfnet_f0_plus"]
    assert nfk.list_models("*_plus") == [f"nfnet_f{i}_plus" for i in range(8)]
    assert nfk.list_models("nothing*") == []
    assert nfk.list_models() == sorted(nfk.list_models())


def test_create_model():
    with keras.StatelessScope():
        model = nfk.create_model("nfnet_tiny", weights=None, classes=3, name="mine")
    assert isinstance(model, nfk.NormalizerFreeModel)
    assert (model.name, model.output_shape) == ("mine", (None, 3))


@pytest.mark.parametrize("name", ["nfnet_f9", "NFNet_F0", "nfnet-f0"])
def test_unknown_name_names_the_nearest(name):
    with pytest.raises(ValueError, match=rf"{name}.*Nearest: .*nfnet_f.*list_models"):
        nfk.create_model(name)


def test_unlike_anything():
    with pytest.raises(ValueError, match=r"Unknown model: 'xyz'\. `nfnet_keras.list_models"):
        nfk.create_model("xyz")
    with pytest.raises(ValueError, match="Unknown model: None"):
        nfk.create_model(None)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'nfnet_f0' is registered already"):
        register("nfnet_f0", nfk.NFNetF0)
