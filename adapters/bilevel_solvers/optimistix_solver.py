"""Optimistix's iterative solvers, one step at a time."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.outer.suggestion import did_you_mean
from bilevel.perturbation import with_derivative_of
from bilevel.signature import brief
from bilevel.status import Status
from bilevel_solvers.black_box import ROUNDINGS
from bilevel_solvers.foreign import ForeignSolver
from bilevel_solvers.library import load, origin
from bilevel_solvers.single_precision import defaults_of, in_precision_of

KINDS = {
    "AbstractMinimiser": "objective",
    "AbstractFixedPointSolver": "mapping",
    "AbstractRootFinder": None,
    "AbstractLeastSquaresSolver": None,
}
"""What each kind of solver needs of a problem; a residual is had of every one."""


OPTIONS = ("lower", "upper", "jac", "autodiff_mode", "y0_simplex")
"""That methods of optimistix read."""

BY_COMPARISON = ("Bisection", "NelderMead", "GoldenSearch")
"""They move by comparisons alone: their derivative is a zero that the solution's is not."""


PATIENCE = 60
"""Trials in a row, each shorter than the one before, that may be rejected."""


class _Held:
    """What of a state is no array (structures, traced functions), the same at every step."""

    def __init__(self, value: Any):
        self.value = value


class OptimistixState(eqx.Module):
    """Iterate, and optimistix' own state: its arrays, and what of it is none.

    `still`: steps in a row that were rejected. `status`: why to stop, if at all.
    """

    x: PyTree
    arrays: Any
    still: Int[Array, ""]
    status: Int[Array, ""]
    rest: _Held = eqx.field(static=True)


class OptimistixSolver(ForeignSolver):
    """A solver of optimistix; made by [`optimistix`][].

    - `options`: what its methods get as `options`.
    """

    adaptive: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    solver: Any
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())

    @property
    def kind(self) -> str:
        """Which of optimistix' kinds of solvers it is."""
        return next(base.__name__ for base in type(self.solver).__mro__ if base.__name__ in KINDS)

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What it needs of the problem."""
        needed = KINDS[self.kind]
        return frozenset() if needed is None else frozenset({needed})

    @property
    def title(self) -> str:
        """The name of its class."""
        return f"optimistix.{type(self.solver).__name__}"

    def init(self, problem: BoundProblem, x: PyTree) -> OptimistixState:
        """Optimistix' first state."""
        solver = in_precision_of(x, self.solver)
        with defaults_of(x):
            function = self._function(problem)
            shape = jax.eval_shape(lambda x: function(x, None)[0], x)
            first = solver.init(
                function, x, None, dict(self.options), shape, None, self._tags(problem)
            )
        arrays, rest = eqx.partition(first, eqx.is_array)
        fine = jnp.int32(Status.CONVERGED)
        return OptimistixState(x, jax.tree.map(_strong, arrays), jnp.int32(0), fine, _Held(rest))

    def step(
        self, problem: BoundProblem, state: OptimistixState, residual: PyTree
    ) -> OptimistixState:
        """One step."""

        def stepped(pair: Any) -> Any:
            x, arrays = pair
            solver = in_precision_of(x, self.solver)
            with defaults_of(x):
                x, after, _ = solver.step(
                    self._function(problem),
                    x,
                    None,
                    dict(self.options),
                    eqx.combine(arrays, state.rest.value),
                    self._tags(problem),
                )
            arrays, _ = eqx.partition(after, eqx.is_array)
            return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), pair, (x, arrays))

        x, arrays = stepped((state.x, state.arrays))
        if self._is(*BY_COMPARISON):
            x = with_derivative_of(x, residual, jnp.full((), jnp.nan, vector.real_dtype(x)))
        before, after, left = jax.lax.stop_gradient((state.x, x, residual))
        moved = vector.norm(vector.subtract(after, before)) > 0
        still = jnp.where(moved, 0, state.still + 1).astype(jnp.int32)
        norm = vector.norm(left)
        scale = norm if problem.scale is None else problem.scale
        small = norm <= ROUNDINGS * vector.epsilon(x) ** 0.5 * scale
        reason = jnp.where(small, jnp.int32(Status.ROUNDING), jnp.int32(Status.STOPPED))
        status = jnp.where(still >= PATIENCE, reason, state.status)
        return OptimistixState(x, arrays, still, status, state.rest)

    def failure(self, state: OptimistixState) -> Int[Array, ""]:
        """`ROUNDING` or `STOPPED` once trial after trial was rejected."""
        return state.status

    def applications(self, state: OptimistixState, iterations: Array) -> Array:
        """A function value or its linearisation in each step, and the loop's own residuals."""
        del state
        return 2 * iterations + 1

    def _is(self, *names: str) -> bool:
        inner = getattr(self.solver, "solver", self.solver)  # of a BestSoFarMinimiser
        return any(base.__name__ in names for base in type(inner).__mro__)

    def _function(self, problem: BoundProblem) -> Any:
        """What optimistix iterates on: (y, args) -> (value, aux)."""
        needed = KINDS[self.kind]
        if needed is not None:
            function: Any = getattr(problem, needed)
            return lambda x, _: (function(x), None)
        return lambda x, _: (vector.negative(problem.residual(x)), None)

    def _tags(self, problem: BoundProblem) -> frozenset[object]:
        """What lineax may know of the Jacobian of a root."""
        tags: Any = load("lineax")
        known = (problem.symmetric, problem.positive_definite)
        names = ("symmetric_tag", "positive_semidefinite_tag")
        if self.kind != "AbstractRootFinder":
            return frozenset()
        return frozenset(
            getattr(tags, name) for name, is_so in zip(names, known, strict=True) if is_so
        )


def optimistix(solver: Any, **options: Any) -> OptimistixSolver:
    """An iterative solver of optimistix as an inner solver.

    Its `step` is the step: the loop of `bl.solve` drives it to a traced budget and decides on the
    true residual when to stop, so it unrolls, is counted and never compiles anew.  Its own
    `terminate`, and with it `rtol` and `atol`, stops nothing.  Optimistix evaluates at a trial
    point before it moves there, so that the iterate of many solvers is one step behind.

    What it solves: minimisers (`BFGS`, `LBFGS`, `NonlinearCG`, `GradientDescent`, ...) a
    `bl.Minimization`; fixed points a `bl.FixedPoint`; root finders (`Newton`, `Chord`,
    `Bisection`) and least squares (`GaussNewton`, `LevenbergMarquardt`, `Dogleg`) the residual of
    any problem.

    **Arguments:**

    - `solver`: of optimistix, with its settings.
    - `options`: what its methods get as `options`, such as `lower` and `upper`; hashable.

    **Raises:** `TypeError` for anything else.

    >>> import optimistix, jax.numpy as jnp, bilevel as bl, bilevel_solvers
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.cosh(x) - theta * x))
    >>> solver = bilevel_solvers.optimistix(optimistix.BFGS(rtol=1e-6, atol=1e-6))
    >>> solution = bl.solve(problem, 1.0, jnp.zeros(2), solver=solver)
    >>> [round(float(v), 3) for v in solution.value]
    [0.881, 0.881]
    """
    load("optimistix")
    names = [base.__name__ for base in type(solver).__mro__]
    if not any(name in KINDS for name in names) or isinstance(solver, type):
        hint = ""
        if isinstance(solver, type) and origin(solver).startswith("optimistix"):
            hint = f" Write optimistix.{solver.__name__}(rtol=1e-8, atol=1e-8)."
        msg = (
            "bilevel_solvers.optimistix: solver must be an iterative solver of optimistix, such "
            f"as optimistix.BFGS(rtol=1e-8, atol=1e-8), got {brief(solver)}.{hint}"
        )
        raise TypeError(msg)
    for name in options:
        if name not in OPTIONS:
            msg = (
                f"bilevel_solvers.optimistix: no method of optimistix has an option {name!r}"
                f"{did_you_mean(name, OPTIONS)}"
            )
            raise ValueError(msg)
    needed = {"Bisection", "GoldenSearch"}.intersection(names) and {"lower", "upper"} - set(options)
    if needed:
        missing = " and ".join(sorted(needed))
        msg = f"bilevel_solvers.optimistix: {names[0]} needs {missing}: the ends it starts with."
        raise ValueError(msg)
    return OptimistixSolver(solver, tuple(sorted(options.items())))


def _strong(leaf: Any) -> Array:
    return jnp.asarray(leaf, leaf.dtype)
