"""Training: one run of the outer loop, from its first metric to its last."""

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from bilevel.outer.archive import Archive, ResumeError
from bilevel.outer.batches import Batches
from bilevel.outer.callbacks import Callback, Event
from bilevel.outer.checkpoint import is_array
from bilevel.outer.checkpoints.settings import Checkpoints
from bilevel.outer.checkpoints.store import Moment
from bilevel.outer.control import Control, strong
from bilevel.outer.cost import Cost
from bilevel.outer.devices import Placement, scattered
from bilevel.outer.fingerprint import fingerprint
from bilevel.outer.giving_up import given_up, skipped
from bilevel.outer.gradients import GradientComparison, Place
from bilevel.outer.history import History, Record, record_of
from bilevel.outer.limits import limits
from bilevel.outer.listeners import Listeners
from bilevel.outer.machine import device_of
from bilevel.outer.metric import compiled_validation, real_number, same_number, widened
from bilevel.outer.moment import Passed
from bilevel.outer.processes.agreement import Agreement, Alone, agreement
from bilevel.outer.processes.shared import first, gathered, several, shared
from bilevel.outer.progress import Reporter, Silence, batches_in
from bilevel.outer.run import FAILED, Run, summarize
from bilevel.outer.settings import LoopSettings
from bilevel.outer.tally import Tally
from bilevel.outer.task import Task
from bilevel.outer.timing import solver_seconds
from bilevel.outer.update import ERRORS, Report, State
from bilevel.outer.updater import PartedUpdate, WholeUpdate, compares, measures


class Training:
    """One run of the outer loop.

    **Arguments:** those of `optimize`, checked.
    """

    def __init__(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        controller: Any,
        settings: LoopSettings,
        checkpoints: Checkpoints,
        callbacks: Sequence[Callback],
        progress: Reporter,
        label: str,
        mesh: Mesh | None = None,
    ):
        self._task = task
        self.settings = settings
        self._listeners, self._remembered = Listeners(callbacks), dict[str, Any]()
        self._progress = progress
        self._label = label
        self._controller_name = type(controller).__name__

        trained, self._static = eqx.partition(task.parameters, eqx.is_inexact_array)
        # Strongly typed from the start: what comes out of the update is, and a weakly typed
        # beginning would compile twice.
        trained = jax.tree.map(strong, trained)
        state, self._optimizer_static = eqx.partition(optimizer.init(trained), is_array)
        self._state = State(trained, jax.tree.map(strong, state), task.first_memory)
        if batches_in(task.batches) != 1:
            self._state = self._state._replace(previous=trained).first()
        self._placement = Placement(mesh, (self._state.trained, self._state.memory))
        self._state = self._placement.whole(self._state)
        self._batches = Batches(task, self._placement, settings.seed)
        self._batches.check()
        self._agreement: Agreement | Alone = Alone()
        self._control = Control(
            controller,
            measures_metric=task.validate is not None,
            measures_error=task.hypergradient is not None or measures(controller, task),
        )
        self._tally = Tally(at_once=not several())
        self._compares, self._measures = compares(controller), measures(controller, task)
        self._comparison: GradientComparison | None = None
        self._last: tuple[Place, PyTree]
        self._update: WholeUpdate | PartedUpdate
        if self._compares or self._measures:
            self._update = PartedUpdate(
                task, optimizer, self._optimizer_static, self._placement, self._state
            )
            self._comparison = GradientComparison(controller, self._update, self._tally)
        else:
            self._update = WholeUpdate(
                task, optimizer, self._optimizer_static, self._placement, self._state
            )
        self._validation = None
        if task.validate is not None and task.jit_validate:
            self._validation = compiled_validation(task.validate, self._static)

        self._history = History()
        begun_with = fingerprint(task, optimizer, controller, settings.seed)
        begun_with |= self._placement.begun_with
        self._archive = Archive(
            settings.directory,
            begun_with,
            checkpoints,
            writes=first(),
            together=scattered(self._state),
        )
        self._epoch = self._batch = 0
        self._work: int | None = None
        self._metric: np.generic | float | None = None
        self._cost = Cost(self._update, self._control, self._validation)
        self._stop_reason: str | None = None
        self._objected = False
        self._epochs_skipping = 0
        self._latest: tuple[Any, ...]
        self._pass()

    @contextmanager
    def owning(self) -> Generator[None]:
        """The directory is this run's, and nobody else's.

        **Raises:** `DirectoryInUseError`.
        """
        self._archive.claim()
        try:
            self._agreement = agreement()
            try:
                yield
            except BaseException:
                self._agreement.close(together=False)
                raise
            self._agreement.close(together=True)
        finally:
            self._archive.release()

    @property
    def stop_reason(self) -> str | None:
        """Why a callback stopped it; `None` if none did."""
        return self._stop_reason

    @property
    def resumes(self) -> bool:
        """Whether it goes on with a run that its directory holds."""
        return self.settings.resume

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self._batch:
            so_far = f" (updates so far: {self._batch})" if self._batches.count != 1 else ""
            return f"in epoch {self._epoch + 1}{so_far}"
        return f"after epoch {self._epoch}" if self._epoch else "before the first update"

    def go(self) -> None:
        """Train until the last epoch, or until a callback stops it."""
        with self._agreement.hearing():
            self._go()

    def _go(self) -> None:
        self._cost.begin()
        self._progress.start(
            f"{self._task.name}, {self._label}",
            self.settings.epochs,
            self._task.metric_name,
            self._epoch,
        )
        self._archive.open(self._history, self._tell, lambda: self._cost.compilations)
        self._prepare()
        if not self._history:
            seconds = self._validate()
            self._control.start(self._metric)
            self._record(validation_seconds=seconds)
            self._object()
        self._call(lambda event: self._listeners.start(event, self._remembered))
        while self._epoch < self.settings.epochs and self._stop_reason is None:
            self._train_epoch()
            self._call(self._listeners.epoch)

    def end(self, status: str, message: str) -> Run:
        """Close, and keep what was done so far.

        **Raises:** `NotKeptError`.
        """
        self._tally.finish()
        summary = summarize(
            self._history,
            self._tally.numbers() if self._batch else {},
            task=self._task.name,
            policy=self._label,
            controller=self._controller_name,
            seed=self.settings.seed,
            status=status,
            message=message,
            metric_name=self._task.metric_name,
            seconds=self._cost.elapsed,
            compile_seconds=self._cost.all_compile_seconds,
            device=device_of(self._state.trained),
            compilations=self._cost.compilations[0],
            other_compilations=self._cost.compilations[1],
        )
        # An error is seldom that of all processes: then their arrays cannot be put together.
        whole = status != FAILED or not self._archive.together
        theta = jax.tree.map(gathered, self._theta) if whole else self._theta
        run = Run(theta, self._history, summary, self.settings.directory)
        try:
            self._listeners.end(run)
        finally:
            # Before the first metric there is nothing to go on from.
            self._archive.close(run, self._passed.mark() if self._history and whole else None)
            if message:
                kept = self.settings.directory
                self._progress.note(message if kept is None else f"{message}; kept in {kept}")
            self._progress.stop()
        return run

    def _prepare(self) -> None:
        """Have everything compiled at the same time, as far as shapes are known already."""
        if self._epoch >= self.settings.epochs or jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return
        metric: Any = np.float64(math.nan)
        if self._validation is not None:
            metric = self._validation.prepare(self._state.trained)
        elif self._task.validate is not None:
            return  # its dtype is not known before it is called
        if getattr(metric, "shape", None) != ():
            return  # refused when it is measured
        fidelity = self._control.prepare(widened(metric))
        if fidelity is not None:
            self._update.prepare(self._state, self._batches.first(self._epoch + 1), fidelity)

    def _train_epoch(self) -> None:
        number, fidelity = self._epoch + 1, self._control.fidelity
        # Of those made before the run was broken off, what they held has been seen.
        batches = self._batches.of(number, after=self._batch)
        if not self._batch:
            self._tally.begin()
            self._state = self._state.first()
        watch = self._cost.watch()
        for batch in batches:
            self._between()
            self._progress.batch(self._batch + 1, self._batches.count)
            report = self._step(batch)
            self._batch += 1
            self._tally.add(report)
            self._check_streak()
        self._tally.finish()
        self._check_streak()
        errors: Any = [self._tally.mean(part) for part in ERRORS]
        if self._measures:
            errors = self._measured(number)
        seconds = watch()

        validation_seconds = self._validate()
        if self._task.validate is None:
            self._metric = self._tally.mean("loss")
        if self._compares:
            fidelity = self._last[0].fidelity
        spent, measured = limits(fidelity), self._tally.numbers()
        if errors is not None and not self._compares:
            noise = math.nan if measured["gradient_noise"] is None else measured["gradient_noise"]
            self._control.advance(self._metric, self._tally.mean("gradient_norm"), [*errors, noise])
        self._epoch, self._batch = number, 0
        self._record(
            seconds=seconds,
            validation_seconds=validation_seconds,
            **spent,
            **measured,
        )
        self._object()

    def _between(self) -> None:
        """Before an update: save, where that is due, or leave, where someone has said so."""
        # Before the first of an epoch, it has passed at the end of the one before.
        if self._batch and self._archive.keeps:
            self._pass()
        if self._agreement.saves() or (self._batch and self._archive.due):
            self._archive.save(self._passed.mark())
        elif self._archive.overdue:
            self._agreement.ask_to_save()

    def _step(self, batch: Any) -> Report:
        """One update."""
        fidelity = self._control.fidelity
        if self._comparison is None:
            self._state, report = self._update(self._state, batch, fidelity)
            return report
        assert isinstance(self._update, PartedUpdate)
        found, place = self._comparison.found(self._control, self._state, batch)
        self._last = place, found.gradient
        self._state, report = self._update.apply(self._state, batch, place.fidelity, found)
        return report

    def _measured(self, epoch: int) -> list[float] | None:
        """The error of the epoch's last gradient, where it is measured in this epoch."""
        assert self._comparison is not None
        norm = self._tally.mean("gradient_norm")
        if not self._comparison.measures(self._control.state, epoch, self._batch, norm):
            return None
        error = self._comparison.error(self._control.state, *self._last)
        return [float(part) for part in error[:3]]

    def _object(self) -> None:
        """Say, once, that the controller has been given what it cannot use."""
        # A metric that has come down to zero has nothing left to refine for.
        if self._objected or (self._epoch and self._metric == 0):
            return
        objection = self._control.objection(self._metric)
        if objection is None:
            return
        self._objected = True
        self._tell(f"{'epoch ' + str(self._epoch) if self._epoch else 'at the start'}: {objection}")

    def _validate(self) -> float:
        """Measure the metric; the wall time it took, without compilation."""
        validate = self._task.validate
        if validate is None:
            return 0.0
        watch = self._cost.watch()
        value = (
            validate(self._theta)
            if self._validation is None
            else self._validation(self._state.trained)
        )
        self._metric = real_number(value)
        if self._validation is None:  # it may look at what each process has of its own
            self._metric = same_number(self._metric)
        return watch()

    def _record(self, **fields: Any) -> None:
        fields["epoch"] = self._epoch
        fields["metric"] = None if self._metric is None else float(self._metric)
        fields["rejected"] = self._control.rejected
        fields["compile_seconds"] = self._cost.compiled_since()
        fields["elapsed"] = self._cost.elapsed
        record = record_of(fields)
        self._history.append(record)
        if self._archive.keeps:
            self._pass()
            if self._archive.grew(record.metric):
                self._archive.ended_epoch(self._passed.mark())
        if record.work is not None:
            self._work = record.work + (self._work or 0)
        self._progress.epoch(record, self._work)
        if record.nonfinite:
            self._say_skipped(record)

    def _tell(self, message: str) -> None:
        """Say what must not be missed, where it is seen."""
        self._progress.note(message)
        if isinstance(self._progress, Silence) and first():
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _say_skipped(self, record: Record) -> None:
        self._epochs_skipping += 1
        message = skipped(record, self._epochs_skipping)
        if message is not None:
            self._progress.note(message)

    def _check_streak(self) -> None:
        limit, failures = self.settings.max_nonfinite, self._tally.streak_failures
        if self._tally.longest >= limit:
            raise given_up(limit, self.place, self._control.fidelity, failures)

    def _call(self, call: Callable[[Event], None]) -> None:
        if not self._listeners and not several():
            return
        event = Event(
            task=self._task,
            epoch=self._epoch,
            epochs=self.settings.epochs,
            theta=self._theta,
            fidelity=self._control.fidelity,
            history=self._history,
        )
        call(event)
        self._latest = (*self._latest[:-1], self._listeners.kept)
        self._stop_reason = shared(event.stop_reason)

    def _pass(self) -> None:
        """Remember, as cheaply as can be, this moment: all parts of the run agree in it."""
        self._latest = (
            (self._epoch, self._batch),
            self._state,
            self._control.state,
            self._tally.mark(),
            self._metric,
            len(self._history),
            self._listeners.kept,
        )

    @property
    def _passed(self) -> Passed:
        place, *parts = self._latest
        return Passed(Moment(*place), *parts)

    def restore(self) -> None:
        """Take up the run in the directory where its last checkpoint left it.

        **Raises:** `ResumeError`.
        """
        self._control.state = self._control.blank
        self._pass()
        found = self._archive.restore(lambda place: self._passed._replace(place=place).kept())
        place, kept, self._history = found.place, found.state, found.history
        self._remembered = found.callbacks
        begun = place.epoch + (place.batch > 0)
        if begun > self.settings.epochs:
            msg = f"optimize: the run is past {place.words}. Give epochs={begun} or more."
            raise ResumeError(msg)
        self._epoch, self._batch = place
        self._state = self._state._replace(
            **{name: kept[name] for name in State._fields if name in kept}
        )
        self._control.restore(kept["controller"])
        self._tally.restore(kept["tally"])
        self._metric = self._history[-1].metric
        self._pass()
        self._work = self._history.work
        self._cost.go_on(self._history, found.compilations)

    @property
    def _theta(self) -> PyTree:
        return eqx.combine(self._state.trained, self._static)

    def solver_seconds(self, share: float = 0.05) -> float | None:
        """What the solves' iterations took, timed after the run; see `timing.solver_seconds`.

        **Arguments:**

        - `share`: of the run's wall time that this may take.
        """
        if self._update.count != 1 or jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return None  # several sizes of problem, each with iterations of its own
        batch = self._batches.first(max(self._epoch, 1))
        return solver_seconds(
            lambda fidelity: self._update(self._state, batch, fidelity)[1],
            self._control.fidelity,
            self._history,
            limit=share * self._history[-1].elapsed,
        )
