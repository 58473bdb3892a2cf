"""Checks of arguments that several modules take."""

from numbers import Integral
from typing import Any

__all__ = ["check_count", "check_positive"]


def check_count(name: str, value: Any, *, least: int) -> None:
    """Refuses what is not a whole number of at least `least`, by the argument's name.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}; give a whole number of at least {least}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_positive(**given: float) -> None:
    """Refuses numbers that are not above zero, by the argument's name.

    Raises:
        ValueError: One is not.
    """
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive")
