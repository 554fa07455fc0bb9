"""Tally: the reports of an epoch's updates, fetched from the device and added up."""

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from bilevel.outer.update import ERRORS, REPORT

_PLACE = {name: place for place, name in enumerate(REPORT)}
_COUNTS = tuple(REPORT[REPORT.index("solves") :])
_WORK = tuple(name for name in _COUNTS if name.endswith(("iterations", "applications")))
_IS_WORK = np.array([name in _WORK for name in REPORT])
_RESIDUALS = ("primal_residual", "adjoint_residual")


class Mark(NamedTuple):
    """A tally at some moment; its arrays are nobody's to change."""

    counts: tuple[int, ...]
    over_made: np.ndarray
    over_all: np.ndarray
    squared_noise: float
    reported: np.ndarray
    waiting: tuple[jax.Array, ...]


class Tally:
    """Adds up reports without making the host wait for the device.

    Reports are read when they are ready, so a run of non-finite gradients is seen within
    an update or two; at most `ahead` updates are under way at any time.

    - `updates`, `nonfinite`: updates made and updates skipped in this epoch.
    - `made`: updates made in all epochs.
    - `longest`: most updates in a row that were not finite, in all epochs.
    - `streak_failures`: solves that failed, primal or adjoint, in the latest updates in a
        row that were not finite.

    **Arguments:**

    - `ahead`: how many updates may be under way.
    - `at_once`: whether a report is read as soon as it is ready. Processes that have to find
        the same at the same update cannot wait for what their own devices happen to do.
    """

    def __init__(self, ahead: int = 32, *, at_once: bool = True):
        self._at_once = at_once
        self.made = 0
        self.longest = 0
        self.streak_failures = 0
        self._streak = 0
        self._ahead = ahead
        self._waiting: deque[jax.Array] = deque()
        self.begin()

    def begin(self) -> None:
        """Begin an epoch."""
        self._waiting.clear()
        self.updates = 0
        self.nonfinite = 0
        # Sums on the host, in double precision: counts stay exact whatever the device's
        # dtype, and a long epoch needs no more room than a short one.
        self._over_made = np.zeros(len(REPORT))
        self._over_all = np.zeros(len(REPORT))
        self._reported = np.zeros(len(REPORT), dtype=bool)
        self._squared_noise, self._noises = 0.0, 0

    def mark(self) -> "Mark":
        """All there is so far, to return to; costs next to nothing."""
        return Mark(
            (
                self.updates,
                self.nonfinite,
                self.made,
                self.longest,
                self.streak_failures,
                self._streak,
                self._noises,
            ),
            self._over_made,
            self._over_all,
            self._squared_noise,
            self._reported,
            tuple(self._waiting),
        )

    def return_to(self, mark: "Mark") -> None:
        """As it was then."""
        self.updates, self.nonfinite, self.made, self.longest = mark.counts[:4]
        self.streak_failures, self._streak, self._noises = mark.counts[4:]
        self._over_made, self._over_all = mark.over_made, mark.over_all
        self._squared_noise, self._reported = mark.squared_noise, mark.reported
        self._waiting = deque(mark.waiting)

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint; waits for the updates under way."""
        self.finish()
        mark = self.mark()
        return {
            "counts": np.array(mark.counts, np.int64),
            "sums": np.stack([mark.over_made, mark.over_all]),
            "squared_noise": np.asarray(mark.squared_noise, np.float64),
            "reported": mark.reported,
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """From a checkpoint."""
        counts = tuple(int(count) for count in np.asarray(arrays["counts"]))
        made, over_all = np.asarray(arrays["sums"], np.float64)
        noise = float(np.asarray(arrays["squared_noise"]))
        reported = np.asarray(arrays["reported"], bool)
        self.return_to(Mark(counts, made, over_all, noise, reported, ()))

    def add(self, report: jax.Array) -> None:
        """Take the report of an update, and read those that are ready."""
        self._waiting.append(report)
        while len(self._waiting) > self._ahead:
            self._read()
        while self._at_once and self._waiting and _is_ready(self._waiting[0]):
            self._read()

    def spend(self, report: np.ndarray) -> None:
        """Count the work of a gradient that no update was made with."""
        row = np.asarray(report, dtype=np.float64)
        row = np.where(np.isfinite(row), row, 0.0)
        # Residuals are means over solves, of which these are no part.
        self._over_all = self._over_all + np.where(_IS_WORK, row, 0.0)

    def finish(self) -> None:
        """Wait for the updates under way and read their reports."""
        while self._waiting:
            self._read()

    def mean(self, name: str) -> float:
        """Mean of a number over the updates made; NaN if there is none."""
        return float(self._over_made[_PLACE[name]] / self.updates) if self.updates else math.nan

    def numbers(self) -> dict[str, float | int | None]:
        """The fields of a record; `None` where nothing was reported."""
        fields: dict[str, float | int | None] = {
            "updates": self.updates,
            "nonfinite": self.nonfinite,
        }
        for name in ("loss", "gradient_norm", *ERRORS):
            value = self.mean(name)
            fields[name] = None if math.isnan(value) else value
        # Of squares: variances add up, and a root mean square is their standard deviation.
        noise = math.sqrt(self._squared_noise / self._noises) if self._noises else None
        fields["gradient_noise"] = noise
        sums = {name: float(self._over_all[_PLACE[name]]) for name in _COUNTS}
        if any(sums.values()):
            # Fed by hand, a probe may not say how many solves there were.
            solves = sums["solves"] or self.updates + self.nonfinite
            for name in _RESIDUALS:
                fields[name] = sums[name] / solves if self._reported[_PLACE[name]] else None
            fields |= {name: round(sums[name]) for name in _COUNTS if name not in _RESIDUALS}
        return fields

    def _read(self) -> None:
        row = np.asarray(self._waiting.popleft(), dtype=np.float64)
        finite = np.isfinite(row)
        # New arrays each time: marks keep the old ones.
        self._over_all = self._over_all + np.where(finite, row, 0.0)
        self._reported = self._reported | finite
        if row[_PLACE["finite"]]:
            self._over_made = self._over_made + row
            noise = row[_PLACE["gradient_noise"]]
            if math.isfinite(noise):
                self._squared_noise += noise**2
                self._noises += 1
            self.updates += 1
            self.made += 1
            self._streak = self.streak_failures = 0
        else:
            self.nonfinite += 1
            self._streak += 1
            failures = float(row[_PLACE["failures"]])
            self.streak_failures += round(failures) if math.isfinite(failures) else 0
            self.longest = max(self.longest, self._streak)


def _is_ready(report: jax.Array) -> bool:
    return report.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
