"""Counts of the numerical matrix, over all tests of this folder, at the end of a run."""

import collections
from typing import Any

import pytest

COUNTED = ("cells", "violations", "estimates", "estimates below", "estimates beyond tenfold")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = collections.Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                counts.update({k: n for k, n in report.user_properties if k in COUNTED})
    if not counts:
        return
    terminalreporter.section("numerical matrix")
    terminalreporter.line(f"{counts['cells']:,} cells, {counts['violations']:,} violations")
    if total := counts["estimates"]:
        covered = 1 - counts["estimates below"] / total
        terminalreporter.line(
            f"{total:,} error estimates, {covered:.1%} of them at least the true error, "
            f"{counts['estimates beyond tenfold']:,} more than ten times it"
        )


@pytest.fixture
def count(record_property: Any) -> Any:
    """Say how many cells a test looked at, and which of them are violations."""

    def say(cells: int, violations: list[str]) -> None:
        record_property("cells", cells)
        record_property("violations", len(violations))
        assert not violations, "\n".join(violations)

    return say
