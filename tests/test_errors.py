"""Numbers as a user reads them."""

import math

from errors import decimals


def test_a_number_that_is_not_zero_does_not_look_like_zero():
    assert [decimals(x, 3) for x in (0.1234, 0.0, 2e-5, -2e-5, 0.0005, 0.00049)] == [
        "0.123",
        "0.000",
        "2e-05",
        "-2e-05",
        "0.001",
        "0.00049",
    ]
    assert decimals(0.03, 0) == "0.03" and decimals(1234567.8, 1) == "1,234,567.8"
    assert decimals(math.nan, 2) == "nan" and decimals(math.inf, 2) == "inf"
