"""Numbers of a command line."""

from __future__ import annotations

import argparse


def positive(text: str, at_least: int = 1) -> int:
    """A type for argparse."""
    number = int(text)
    if number < at_least:
        raise argparse.ArgumentTypeError(f"{text}: expected at least {at_least}")
    return number
