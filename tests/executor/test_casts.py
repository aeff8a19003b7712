"""Fast casts give the bits of ml_dtypes and numpy."""

import ml_dtypes
import numpy as np
import pytest

from carnet.dtypes import array_type
from carnet.executor.casts import cast

UPPER = np.arange(1 << 16, dtype=np.uint32) << 16
LOWER = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


def bits_of(values):
    return values.view(f"u{values.dtype.itemsize}")


def crossed(values, kind, room=1 << 14):
    target = np.zeros(values.shape, f"u{array_type(kind[1]).itemsize}")
    finite = cast(bits_of(values), target, kind, np.empty(room, np.uint8))
    return target, finite


@pytest.mark.parametrize("lower", [*LOWER, None], ids=lambda lower: "random" if lower is None else hex(lower))
def test_every_upper_half_of_f32_rounds_to_bf16_as_ml_dtypes_rounds(lower):
    low = np.random.default_rng(0).integers(0, 1 << 16, 1 << 16, np.uint32) if lower is None else np.uint32(lower)
    values = (UPPER | low).view(np.float32)
    found, _ = crossed(values, ("f32", "bf16"))
    with np.errstate(all="ignore"):
        assert np.array_equal(found, bits_of(values.astype(ml_dtypes.bfloat16)))


def test_every_bf16_value_becomes_the_f32_of_the_same_value():
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    found, finite = crossed(values, ("bf16", "f32"))
    assert np.array_equal(found, UPPER)
    assert finite


@pytest.mark.parametrize(
    "kind", [("bf16", "f16"), ("f16", "bf16"), ("f16", "f32"), ("f32", "f16"), ("f64", "f32"), ("f32", "f64")]
)
def test_every_pair_of_floats_rounds_as_astype_rounds(kind):
    values = np.random.default_rng(1).standard_normal(5000).astype(array_type(kind[0]))
    found, finite = crossed(values, kind, room=256)
    assert np.array_equal(found, bits_of(values.astype(array_type(kind[1]))))
    assert finite


@pytest.mark.parametrize(
    ("value", "kind", "finite"),
    [
        (65504.0, ("f32", "f16"), True),  # the largest f16
        (65519.0, ("f32", "f16"), True),  # still rounds down to it
        (65520.0, ("f32", "f16"), False),  # the first that rounds to infinity
        (70000.0, ("bf16", "f16"), False),
        (-70000.0, ("bf16", "f16"), False),
        (np.inf, ("f32", "f16"), True),  # was infinite before
        (np.nan, ("f32", "f16"), True),
        (3.4e38, ("f32", "bf16"), False),
        (-3.4e38, ("f32", "bf16"), False),
        (np.inf, ("f32", "bf16"), True),
        (np.nan, ("f32", "bf16"), True),
        (1e39, ("f64", "f32"), False),
    ],
)
def test_a_finite_value_that_becomes_infinite_is_told(value, kind, finite):
    values = np.array([1.0, value, 2.0], array_type(kind[0]))
    assert crossed(values, kind)[1] is finite


def test_strided_sides_and_scratch_for_a_few_elements_change_nothing():
    values = np.random.default_rng(2).standard_normal((7, 5, 6)).astype(np.float32)
    target = np.zeros((6, 7, 10), np.uint16)
    view = target[:, :, ::2].transpose(1, 2, 0)
    assert cast(bits_of(values), view, ("f32", "bf16"), np.empty(16, np.uint8))
    assert np.array_equal(view, bits_of(values.astype(ml_dtypes.bfloat16)))
    assert not target[:, :, 1::2].any()
