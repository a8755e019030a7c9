"""Checks of arguments, before anything is sent. Their errors name the argument."""

import math
import operator
from numbers import Real
from typing import Any

import numpy as np

from heatlens._exceptions import InvalidArgumentError

MAX_INT32 = 2**31 - 1
# About 30 years. gRPC counts in nanoseconds since 1970 in 64 bits: from 7e9 s on a deadline is over before it begins.
MAX_SECONDS = 1e9


def checked_int(argument: str, value: object, *, at_least: int, at_most: int = MAX_INT32) -> int:
    """Return the value as an int. numpy's integers are allowed; bools and floats are not."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not at_least <= number <= at_most:
        raise InvalidArgumentError.of(argument, f"expected an integer from {at_least} to {at_most}, got {value!r}")
    return number


def checked_bool(argument: str, value: object) -> bool:
    """Return the value: True or False, numpy's too. Other truthy values, such as "no", are refused."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InvalidArgumentError.of(argument, f"expected True or False, got {value!r}")


def checked_timeout(timeout: float | None) -> float | None:
    """Return the timeout in seconds, None for no limit.

    Raises:
        InvalidArgumentError: not a number from above 0 to MAX_SECONDS.
    """
    if timeout is None:
        return None
    if 0 < (seconds := as_float(timeout)) <= MAX_SECONDS:
        return seconds
    raise InvalidArgumentError.of(
        "timeout", f"expected seconds > 0 and <= {MAX_SECONDS:g}, or None for no limit; got {timeout!r}"
    )


def as_float(value: object) -> float:
    """Return a real number, numpy's too, as a float; NaN, which fails every comparison, for all else.

    A bool is no number: True would be one second.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def is_text(value: object) -> bool:
    """Whether this is a string that UTF-8 can carry: half of a surrogate pair cannot be."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def number_of(argument: str, name: str | None, names: dict[str, int]) -> Any:  # noqa: ANN401 - any enum's value
    """Return the enum value of a public name; None is the zero value.

    Raises:
        InvalidArgumentError: no such name.
    """
    if name is None:
        return 0
    if not isinstance(name, str) or name not in names:
        raise InvalidArgumentError.of(argument, f"expected one of {', '.join(names)}; got {name!r}")
    return names[name]
