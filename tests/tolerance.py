"""How near is equal. One table: the largest error allowed, over max(1, largest magnitude of the reference)."""

import numpy as np

OUTPUT = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
GRADIENT = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def error(actual, reference):
    """The largest difference over max(1, largest magnitude). NaN and infinities must agree in place and sign."""
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == reference.shape, (actual.shape, reference.shape)
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(actual[~finite], reference[~finite])
    if not finite.any():
        return 0.0
    assert np.isfinite(actual[finite]).all(), "not finite where the reference is"
    return np.abs(actual[finite] - reference[finite]).max() / max(1.0, np.abs(reference[finite]).max())


def assert_close(actual, reference, tolerance):
    worst = error(actual, reference)
    assert worst <= tolerance, f"off by {worst:.3g}, allowed is {tolerance:g}"
