"""What a command prints."""

import sys


def put(text: str) -> None:
    """Text on standard output."""
    sys.stdout.write(f"{text}\n")


def say(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"bilevel: {' '.join(message.split())}\n")
