"""The command line `bilevel`: run, compare, sweep, plot, report, info."""

from bilevel.cli.command import main

__all__ = ["main"]
