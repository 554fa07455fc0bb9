"""Assignment: the controller that a policy stands for, on a given task."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bilevel.budget import UNLIMITED, Budget
from bilevel.outer.policy import Policy
from bilevel.outer.task import Task
from bilevel.refinement.automatic import AutomaticRefinement
from bilevel.refinement.error_controlled import ErrorControlled
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.fixed import FixedFidelity
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.progressive import ProgressiveRefinement
from bilevel.refinement.scheduled import HoagTolerances, ScheduledFidelity


def default_policy(task: Task) -> str:
    """What a task is trained with when nobody says: its own controller, else `prdp`, else `full`.

    **Raises:** `ValueError` for a task without controller, ladder and full fidelity.
    """
    if task.controller is not None:
        return "task"
    if task.ladder is not None:
        return "prdp"
    if task.full_fidelity is not None:
        return "full"
    msg = (
        f"the task {task.name!r} has no controller, no ladder and no full fidelity: say with "
        "which budget it is trained, for example by the policy fixed=100."
    )
    raise ValueError(msg)


def controller_for(policy: Policy, task: Task) -> Any:
    """The controller of a policy.

    **Arguments:**

    - `policy`: from `parse_policy`; `best-fixed` stands for no single controller.
    - `task`: its ladder, full fidelity and refinement settings are used.

    **Raises:** `ValueError` where the task lacks what the policy needs.
    """
    build = _BUILDERS.get(policy.kind)
    if build is None:
        why = "it is a search over many runs, which only a comparison makes"
        raise ValueError(_unusable(policy, why))
    return build(policy, task)


def _fixed(policy: Policy, task: Task) -> FixedFidelity:
    primal, adjoint = policy.numbers
    static = () if task.full_fidelity is None else task.full_fidelity.static
    return FixedFidelity(Fidelity(Budget(primal), Budget(adjoint), static=static))


def _full(policy: Policy, task: Task) -> FixedFidelity:
    full = task.full_fidelity
    if full is None:
        raise ValueError(_lacks(policy, task, "full fidelity or ladder", "full= or ladder="))
    return FixedFidelity(full)


def _scheduled(policy: Policy, task: Task) -> ScheduledFidelity:
    ladder, step = _ladder(policy, task), policy.numbers[0]
    if policy.sequence == "iterations":
        return ScheduledFidelity(_by_iterations(policy, ladder))
    top = len(ladder)
    # Cut before the product, which could leave int32.
    return ScheduledFidelity(ladder, lambda updates: step * jnp.minimum(updates, top))


def _by_iterations(policy: Policy, ladder: Ladder) -> Ladder:
    """From the coarsest budget to the finest in equal steps, its tolerances kept."""
    caps = [int(fidelity.budget.iterations) for fidelity in (ladder.coarsest, ladder.finest)]
    if not ladder.has_one_shape or caps[0] >= caps[1] or caps[1] >= UNLIMITED:
        why = "the task's ladder is none of iterations"
        raise ValueError(_unusable(policy, f"{why}; take schedule=linear:STEP"))
    stepped = Ladder.iterations(caps[0], policy.numbers[0], caps[1])
    budget = ladder.finest.budget
    rtol, atol = float(budget.rtol), float(budget.atol)
    if rtol or atol:
        stepped = stepped.with_tolerances(Budget(rtol=rtol, atol=atol))
    return stepped.with_static(**dict(ladder.finest.static)) if ladder.finest.static else stepped


def _hoag(policy: Policy, task: Task) -> ScheduledFidelity:
    sequence: Any = policy.sequence
    full = task.full_fidelity
    if full is None:
        tolerances = HoagTolerances(sequence)
        return ScheduledFidelity(Ladder.from_schedule(tolerances, tolerances.levels, None))
    # What the full solve does is the end of it: nothing is bought below its tolerance.
    both = full.budget, full.budget if full.adjoint_budget is None else full.adjoint_budget
    starts = HoagTolerances(sequence)
    ends = [max(float(budget.rtol), starts.stop) for budget in both]
    schedules = [HoagTolerances(sequence, max(starts.start, end), stop=end) for end in ends]
    levels = max(schedule.levels for schedule in schedules)
    caps = [int(budget.iterations) for budget in both]
    ladder, adjoint = (
        Ladder.from_schedule(schedule, levels, None if cap >= UNLIMITED else cap)
        for schedule, cap in zip(schedules, caps, strict=True)
    )
    ladder = ladder.with_adjoint(adjoint)
    return ScheduledFidelity(ladder.with_static(**dict(full.static)) if full.static else ladder)


def _progressive(policy: Policy, task: Task) -> ProgressiveRefinement:
    return ProgressiveRefinement(_ladder(policy, task), **task.refinement)


def _error_controlled(policy: Policy, task: Task) -> ErrorControlled:
    return ErrorControlled(_ladder(policy, task))


def _automatic(policy: Policy, task: Task) -> AutomaticRefinement:
    return AutomaticRefinement(_ladder(policy, task))


def _own(policy: Policy, task: Task) -> Any:
    if task.controller is None:
        raise ValueError(_unusable(policy, "the task brings no controller of its own"))
    return task.controller


def _ladder(policy: Policy, task: Task) -> Ladder:
    if task.ladder is None:
        raise ValueError(_lacks(policy, task, "ladder", "ladder="))
    return task.ladder


def _lacks(policy: Policy, task: Task, what: str, argument: str) -> str:
    return (
        f"policy {policy.text!r} needs a {what}, which the task {task.name!r} does not have; give "
        f"its Task {argument}, or take fixed=K."
    )


def _unusable(policy: Policy, why: str) -> str:
    return f"policy {policy.text!r} cannot be used here: {why}."


_BUILDERS: dict[str, Callable[[Policy, Task], Any]] = {
    "full": _full,
    "fixed": _fixed,
    "schedule": _scheduled,
    "hoag": _hoag,
    "prdp": _progressive,
    "error": _error_controlled,
    "auto": _automatic,
    "task": _own,
}
