"""`bilevel report`: one page of runs and comparisons."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bilevel.cli.failure import DONE, FAILED, UsageError, reason
from bilevel.cli.output import put, say
from bilevel.outer.report.page import MissingTemplatesError, write_page
from bilevel.outer.report.section import Section
from bilevel.outer.report.source import read_sections

_FORMATS = (".html", ".htm")
_DEFAULT = "report.html"


def report(options: argparse.Namespace) -> int:
    """Write a page of what the options name, or print what it would find.

    **Returns:** the exit code.
    """
    output: Path | None = options.output
    if options.text and output is not None:
        msg = "--text prints and --output writes a page; give one of them."
        raise UsageError(msg)
    if output is not None and output.suffix.lower() not in _FORMATS:
        msg = f"--output {output}: the ending should be .html."
        raise UsageError(msg)
    try:
        sections = read_sections(options.runs)
        if options.text:
            put(_in_words(sections))
            return DONE
        page = write_page(sections, output or _beside(options.runs[0]))
    except OSError as error:
        if error.errno is None:  # raised here, with a sentence
            raise UsageError(str(error)) from error
        where = f"{error.filename}: " if error.filename else ""
        msg = f"{where}{reason(error)}."
        raise UsageError(msg) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    except MissingTemplatesError as error:
        say(str(error))
        return FAILED
    put(str(page))
    return DONE


def _beside(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / _DEFAULT


def _in_words(sections: Sequence[Section]) -> str:
    """The findings, a line each."""
    lines: list[str] = []
    for section in sections:
        for policy, findings in section.findings:
            lines.append(f"{section.title}, {policy}")
            lines += [f"  {each.weight.name.lower()}: {each}" for each in findings]
            lines += [] if findings else ["  nothing stands out"]
    return "\n".join(lines)
