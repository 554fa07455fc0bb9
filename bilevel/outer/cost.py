"""Cost: the wall time of a run and the compilations in it, over all its lives."""

import time
from collections.abc import Callable

from bilevel.outer.control import Control
from bilevel.outer.executable import Executable
from bilevel.outer.history import History
from bilevel.outer.updater import Updater


class Cost:
    """What a run has taken so far.

    **Arguments:**

    - `update`, `control`: of the run.
    - `validation`: where it is compiled.
    """

    def __init__(
        self, update: Updater, control: Control, validation: Executable[..., object] | None
    ):
        self._update, self._control, self._validation = update, control, validation
        self._started = time.perf_counter()
        self._elapsed_before = self._compiled_before = self._told = 0.0
        self._compilations_before = 0, 0

    def begin(self) -> None:
        """Begin to count."""
        self._started = time.perf_counter()

    def go_on(self, history: History, compilations: tuple[int, int]) -> None:
        """Add what earlier lives of the run have taken."""
        self._elapsed_before = history[-1].elapsed
        self._compiled_before = float(history.total("compile_seconds") or 0.0)
        self._compilations_before = compilations

    @property
    def elapsed(self) -> float:
        """Seconds of all lives."""
        return self._elapsed_before + time.perf_counter() - self._started

    @property
    def all_compile_seconds(self) -> float:
        """Seconds that compilations took, in all lives."""
        return self._compiled_before + self._compile_seconds

    @property
    def compilations(self) -> tuple[int, int]:
        """Of the update, and of validation and controller, in all lives of the run."""
        validation = 0 if self._validation is None else self._validation.count
        update, others = self._compilations_before
        return update + self._update.count, others + self._control.compilations + validation

    def compiled_since(self) -> float:
        """Seconds that compilations took since this was last asked."""
        before, self._told = self._told, self._compile_seconds
        return self._told - before

    def watch(self) -> Callable[[], float]:
        """A stopwatch that does not count compilation."""
        compiled, started = self._compile_seconds, time.perf_counter()
        return lambda: time.perf_counter() - started - (self._compile_seconds - compiled)

    @property
    def _compile_seconds(self) -> float:
        validation = 0.0 if self._validation is None else self._validation.seconds
        return self._update.seconds + self._control.compile_seconds + validation
