"""Trajectories: a stepper applied many times."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from bilevel.budget import Budget
from bilevel.compilation import compiled
from bilevel.refinement.fidelity import Fidelity
from bilevel.solution import Solution
from bilevel_pde.stepper import Effort, Stepper, as_array


def rollout(
    stepper: Stepper,
    u0: PyTree,
    steps: int,
    *,
    checkpoint: bool = True,
    fidelity: Fidelity | None = None,
    budget: Budget | None = None,
    adjoint_budget: Budget | None = None,
    theta: Mapping[str, Any] | None = None,
    controls: Mapping[str, Any] | None = None,
    correct: Callable[[Any], Any] | None = None,
) -> Any:
    """The states after 1, 2, ..., `steps` steps, differentiable.

    Compiles once for each number of steps, whatever the budgets.

    **Arguments:**

    - `stepper`: a stepper, such as [`Heat`][].
    - `u0`: the first state, like `stepper.like`.
    - `steps`: at least 1, static.
    - `checkpoint`: keep one state a step for a gradient, and solve each step once more on the
        way back; `False` keeps what every step needs, and solves once.
    - `fidelity`, or `budget` and `adjoint_budget`: of every step's solve. A probe in the
        fidelity adds up over the steps.
    - `theta`: parameters in place of the stepper's own, the same in every step.
    - `controls`: parameters by name, too, with an axis in front, one entry for each step.
    - `correct`: applied to the state after each step, such as a network that corrects it.

    **Returns:** states with an axis in front, of length `steps`; u0 is not among them. From a
    step on that failed (as of `Stepper.step`) they are NaN.

    **Raises:** `ValueError` for less than one step and controls of another length or that are
    not finite, and what `Stepper.step` raises.

    >>> import jax.numpy as jnp, bilevel_pde as pde
    >>> grid = pde.Grid(8)
    >>> rollout(pde.Heat(grid, 0.1, dt=0.01), jnp.ones(8), 3).shape
    (3, 8)
    """
    return rollout_with_solutions(
        stepper,
        u0,
        steps,
        checkpoint=checkpoint,
        fidelity=fidelity,
        budget=budget,
        adjoint_budget=adjoint_budget,
        theta=theta,
        controls=controls,
        correct=correct,
    )[0]


def rollout_with_solutions(
    stepper: Stepper,
    u0: PyTree,
    steps: int,
    *,
    checkpoint: bool = True,
    fidelity: Fidelity | None = None,
    budget: Budget | None = None,
    adjoint_budget: Budget | None = None,
    theta: Mapping[str, Any] | None = None,
    controls: Mapping[str, Any] | None = None,
    correct: Callable[[Any], Any] | None = None,
) -> tuple[Any, Solution]:
    """The trajectory, and the solution of every step with an axis in front.

    Arguments are those of [`rollout`][].

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_pde as pde
    >>> stepper = pde.Heat(pde.Grid(8), 0.1, dt=0.01)
    >>> _, solution = rollout_with_solutions(stepper, jnp.ones(8), 2, budget=bl.Budget(3))
    >>> solution.iterations.tolist()
    [3, 3]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        msg = f"rollout: steps should be an integer of at least 1, got {steps!r}."
        raise ValueError(msg)
    if not isinstance(stepper, Stepper):
        msg = f"rollout: stepper should be a Stepper such as Heat(...), got {stepper!r}."
        raise TypeError(msg)
    u0 = stepper.checked_state("u0", u0)
    stepper = stepper.replaced(theta)
    given: Any = {} if controls is None else controls
    given = jax.tree.map(lambda leaf: as_array("rollout", "controls", leaf), given)
    for leaf in jax.tree.leaves(given):
        if leaf.ndim == 0 or leaf.shape[0] != steps:
            msg = (
                f"rollout: controls should have an axis of {steps} steps in front, got shape "
                f"{leaf.shape}."
            )
            raise ValueError(msg)
    stepper.check_controls(given)
    effort = Effort.of(fidelity, budget, adjoint_budget)
    return _rollout(stepper, u0, steps, checkpoint, effort, given, correct)


@compiled
def _rollout(
    stepper: Stepper,
    u0: PyTree,
    steps: int,
    checkpoint: bool,  # noqa: FBT001
    effort: Effort,
    controls: Any,
    correct: Callable[[Any], Any] | None,
) -> tuple[Any, Solution]:
    def advance(u: Any, control: Any) -> tuple[Any, tuple[Any, Solution]]:
        solution = stepper.replaced(control).advanced(u, u, effort)
        moved = solution.value
        if correct is not None:
            moved = stepper.checked_state("correct: its result", correct(moved))
        return moved, (moved, solution)

    if checkpoint:
        # Inside of a scan nothing moves the recomputation forward: no barrier is needed.
        advance = jax.checkpoint(advance, prevent_cse=False)
    return jax.lax.scan(advance, u0, controls, length=steps)[1]
