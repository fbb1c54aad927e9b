"""The one exception for faults in what the user gave."""

from __future__ import annotations


class GrexError(ValueError):
    """Say what was given, what was expected, and what to do. The command line prints it in one line and exits with status 2."""


def fault(given: str, expected: str, remedy: str) -> GrexError:
    """Build the three-part message that every fault in the user's data gets."""
    return GrexError(f"{given}; expected {expected}; {remedy}")
