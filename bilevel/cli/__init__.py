"""The command line `bilevel`: run, compare, plot, info."""

from bilevel.cli.command import main

__all__ = ["main"]
