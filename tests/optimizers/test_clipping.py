"""The clipping rule against an independent NumPy implementation."""

import keras
import numpy as np
import pytest
from keras import ops

from nfnet_keras.optimizers import clip_gradient, clipping, count_units, unitwise_norm
from nfnet_keras.optimizers.clipping import clip_units

SHAPES = [
    (),
    (1,),
    (7,),
    (5, 3),
    (1, 6),
    (6, 1),
    (1, 1, 1, 8),
    (1, 8, 1),
    (4, 3, 5),
    (3, 3, 4, 6),
    (1, 1, 4, 6),
    (2, 3, 2, 4, 5),
]


def draw(shape, seed=0, dtype="float32") -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def mixed(shape, seed=0) -> np.ndarray:
    """A gradient with units over and under the limit."""
    x = draw(shape, seed)
    return x * np.where(np.arange(shape[-1]) % 2, 1e-3, 1.0).astype("float32") if shape else x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(numpy_norm, shape):
    x = draw(shape)
    norm, expected = ops.convert_to_numpy(unitwise_norm(x)), numpy_norm(x)
    np.testing.assert_allclose(norm, expected, rtol=1e-5)
    assert norm.size == count_units(shape)
    assert np.broadcast_shapes(norm.shape, shape) == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clip(numpy_clip, shape):
    gradient, parameter = mixed(shape), draw(shape, 1)
    clipped = ops.convert_to_numpy(clip_gradient(gradient, parameter, 0.05, 1e-3))
    np.testing.assert_allclose(clipped, numpy_clip(gradient, parameter, 0.05, 1e-3), rtol=1e-5, atol=1e-8)
    assert np.any(clipped != gradient)


@pytest.mark.parametrize("axis", [0, -1, (0, 1), (0, 1, 3), (-2,), (0, -1), [1, 2]], ids=str)
def test_axis(numpy_norm, numpy_clip, axis):
    shape = (3, 2, 4, 5)
    gradient, parameter = draw(shape), draw(shape, 1)
    plain = tuple(axis) if isinstance(axis, list) else axis
    np.testing.assert_allclose(
        ops.convert_to_numpy(unitwise_norm(gradient, axis)), numpy_norm(gradient, plain), rtol=1e-5
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(clip_gradient(gradient, parameter, axis=axis)),
        numpy_clip(gradient, parameter, axis=plain),
        rtol=1e-5,
    )
    assert count_units(shape, axis) == numpy_norm(gradient, plain).size


@pytest.mark.parametrize("axis", [4, -5, (0, 4)], ids=str)
def test_axis_out_of_range(axis):
    for call in (lambda x: unitwise_norm(x, axis), lambda x: clip_gradient(x, x, axis=axis)):
        with pytest.raises(ValueError, match=r"`axis`.*\(3, 2, 4, 5\)"):
            call(draw((3, 2, 4, 5)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        clip_gradient(draw((3,)), draw((4,)))


def test_half_precision_does_not_overflow():
    gradient = np.full((1000, 2), 300.0, "float16")
    parameter = np.full((1000, 2), 100.0, "float16")
    norm = unitwise_norm(gradient)
    assert keras.backend.standardize_dtype(norm.dtype) == "float32"
    np.testing.assert_allclose(ops.convert_to_numpy(norm), np.full((1, 2), 300 * 1000**0.5), rtol=1e-3)
    clipped = clip_gradient(gradient, parameter, 0.01)
    assert keras.backend.standardize_dtype(clipped.dtype) == "float16"
    np.testing.assert_allclose(ops.convert_to_numpy(clipped), np.full((1000, 2), 1.0), rtol=2e-3)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX has no float64 unless asked to")
def test_float64_stays():
    x = ops.convert_to_tensor(draw((4, 3), dtype="float64"))
    assert keras.backend.standardize_dtype(unitwise_norm(x).dtype) == "float64"


def test_zero_gradients_and_zero_parameters():
    zeros, ones = np.zeros((4, 3), "float32"), np.ones((4, 3), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(clip_gradient(zeros, zeros)), zeros)
    np.testing.assert_array_equal(ops.convert_to_numpy(clip_gradient(zeros, ones)), zeros)
    # The floor lets parameters that are zero move: norms of 0.01 * 1e-3.
    norm = np.linalg.norm(ops.convert_to_numpy(clip_gradient(ones, zeros, 0.01, 1e-3)), axis=0)
    np.testing.assert_allclose(norm, np.full(3, 1e-5), rtol=1e-5)


def test_gradients_under_the_limit_are_untouched():
    gradient = 1e-3 * draw((3, 3, 4, 5))
    np.testing.assert_array_equal(ops.convert_to_numpy(clip_gradient(gradient, np.ones_like(gradient))), gradient)


def test_nan_passes_through():
    gradient = draw((4, 3))
    gradient[1, 1] = np.nan
    clipped = ops.convert_to_numpy(clip_gradient(gradient, draw((4, 3), 1)))
    assert np.isnan(clipped[1, 1])
    assert not np.isnan(clipped[:, [0, 2]]).any()
    (all_at_once,), _ = clip_units([gradient], [draw((4, 3), 1)], 0.01, 1e-3, [None])
    np.testing.assert_array_equal(ops.convert_to_numpy(all_at_once), clipped)


@pytest.mark.parametrize("alone", [0, 20, 2**19])
def test_clip_units_equals_clip_gradient(numpy_norm, alone, monkeypatch):
    monkeypatch.setattr(clipping, "MIN_SIZE_ALONE", alone)
    rng = np.random.default_rng(3)
    cases = [(shape, None) for shape in SHAPES]
    cases += [
        ((3, 3, 6, 1), (0, 1)),
        ((2, 2, 4, 3), (0, 1, 3)),
        ((5, 4, 3), (0, 1)),
        ((6, 4), 1),
        ((5,), 0),
        ((2, 3, 4), -1),
    ]
    cases = [cases[i] for i in rng.permutation(len(cases))]
    gradients = [mixed(shape, i) for i, (shape, _) in enumerate(cases)]
    parameters = [draw(shape, 100 + i) for i, (shape, _) in enumerate(cases)]
    axes = [axis for _, axis in cases]
    clipped, units = clip_units(gradients, parameters, 0.1, 1e-3, axes)
    expected_count = 0
    for g, p, axis, got in zip(gradients, parameters, axes, clipped, strict=True):
        one = clip_gradient(g, p, 0.1, 1e-3, axis)
        np.testing.assert_allclose(ops.convert_to_numpy(got), ops.convert_to_numpy(one), rtol=2e-5, atol=1e-8)
        expected_count += np.sum(numpy_norm(g, axis) > 0.1 * np.maximum(numpy_norm(p, axis), 1e-3))
    assert np.sum(ops.convert_to_numpy(units.over)) == expected_count
    assert 0 < expected_count < sum(count_units(shape, axis) for shape, axis in cases)
    for name, tensors in (("gradient_norms", gradients), ("parameter_norms", parameters)):
        norms = [numpy_norm(tensor, axis).ravel() for tensor, (_, axis) in zip(tensors, cases, strict=True)]
        found = ops.convert_to_numpy(getattr(units, name))
        for i, expected in enumerate(norms):
            np.testing.assert_allclose(found[units.owners == i], expected, rtol=2e-5)


@pytest.mark.parametrize("shapes", [[(3,), ()], [(3, 3, 2, 4)], [(3, 3, 2, 5)], [(3,), (3, 3, 2, 5)]], ids=str)
def test_clip_units_with_one_kind_of_shape(numpy_clip, shapes, monkeypatch):
    monkeypatch.setattr(clipping, "MIN_SIZE_ALONE", 80)
    gradients, parameters = [draw(s) for s in shapes], [draw(s, 1) for s in shapes]
    clipped, _ = clip_units(gradients, parameters, 0.1, 1e-3, [None] * len(shapes))
    for g, p, got in zip(gradients, parameters, clipped, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(got), numpy_clip(g, p, 0.1), rtol=1e-5)


def test_clip_units_keeps_dtypes():
    gradients = [draw((4, 3)).astype("float16"), draw((3,))]
    clipped, _ = clip_units(gradients, [draw((4, 3), 1), draw((3,), 1)], 0.1, 1e-3, [None, None])
    assert [keras.backend.standardize_dtype(g.dtype) for g in clipped] == ["float16", "float32"]
