"""Row: one policy of a comparison, over its seeds."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from bilevel.outer.run import COMPLETED, STOPPED, Run
from bilevel.outer.spread import Spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One policy, over its seeds.

    - `policy`, `runs`: its name, and how many runs there are.
    - `status`: `completed`, or what became of the others.
    - `final_metric`, `best_metric`: at the end, and the smallest of a run.
    - `relative_metric`: the final metric over full's, seed by seed; `None` unless all runs
        came to their end.
    - `gradient_noise`: of one batch's gradient in the last epoch, as a part of its norm; `None`
        where an epoch has one batch.
    - `primal_iterations`, `adjoint_iterations`, `work`: sums over a run, apart and together.
    - `saved`: part of full's work that a run saves; negative where it does more, `None`
        unless all came to their end with a finite metric, for to give up early is no saving.
    - `seconds`, `seconds_without_compile`, `solver_seconds`: wall time of a run, and of it
        in the solves' iterations.
    - `compilations`: of the update, in a run.
    - `budgets`: what the solves were allowed, from the first epoch to the last, in words.
    - `reached`: runs that came to the target.
    - `epochs_to_target`, `work_to_target`, `seconds_to_target`,
        `seconds_to_target_without_compile`: until then, over the runs that did; work is
        primal and adjoint iterations together.
    - `saved_to_target`, `seconds_saved_to_target`: part of full's work and wall time until
        then that is saved, over the seeds with which both got there.
    """

    policy: str
    runs: int
    status: str
    final_metric: Spread | None
    best_metric: Spread | None
    relative_metric: Spread | None
    gradient_noise: Spread | None
    primal_iterations: Spread | None
    adjoint_iterations: Spread | None
    work: Spread | None
    saved: float | None
    seconds: Spread | None
    seconds_without_compile: Spread | None
    solver_seconds: Spread | None
    compilations: Spread | None
    budgets: str
    reached: int | None
    epochs_to_target: Spread | None
    work_to_target: Spread | None
    seconds_to_target: Spread | None
    seconds_to_target_without_compile: Spread | None
    saved_to_target: float | None
    seconds_saved_to_target: float | None


def came_to_its_end(run: Run) -> bool:
    """Whether a run was not broken off, and its metric is a number."""
    metric = run.summary.final_metric
    return run.status in (COMPLETED, STOPPED) and (metric is None or math.isfinite(metric))


def outcome(runs: Sequence[Run]) -> str:
    """What became of runs: `completed`, or how many of them something else."""
    ended = (COMPLETED, STOPPED)
    words = [
        "ended not finite" if run.status in ended and not came_to_its_end(run) else run.status
        for run in runs
    ]
    statuses = Counter(word for word in words if word != COMPLETED)
    return (
        ", ".join(
            status if count == len(runs) else f"{count} of {len(runs)} {status}"
            for status, count in sorted(statuses.items())
        )
        or COMPLETED
    )
