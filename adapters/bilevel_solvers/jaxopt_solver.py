"""Jaxopt's iterative solvers, one update at a time."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.forward_only import forward_only
from bilevel.perturbation import with_derivative_of
from bilevel.signature import brief
from bilevel.status import Status
from bilevel_solvers.foreign import ForeignSolver
from bilevel_solvers.jaxopt_family import CONSTRAINED, Family, family_of, is_indicator
from bilevel_solvers.library import load, origin
from bilevel_solvers.single_precision import defaults_of
from bilevel_solvers.two_ways import evaluated_as

OURS = frozenset({"maxiter", "tol", "implicit_diff", "implicit_diff_solve", "jit", "unroll"})
"""Settings that the loop and the estimator decide instead."""

WITH_GRADIENT = frozenset({"LBFGS", "BFGS", "NonlinearCG"})
"""Their state holds the gradient at the iterate, which spares one evaluation."""


_NO_REVERSE = (
    "Unrolled: jaxopt.LBFGSB has loops that reverse mode does not go through, whatever its "
    "settings. Use Implicit, or jaxopt.ProjectedGradient."
)

_NO_REVERSE_SEARCH = {
    "hager-zhang": (
        "Unrolled: jaxopt's line search hager-zhang has loops that reverse mode does not go "
        "through, whatever its settings. Use Implicit, or linesearch='backtracking'."
    ),
    "zoom": (
        "Unrolled: the derivative of jaxopt's line search zoom, its default, is NaN, in jaxopt "
        "itself, too. Use Implicit, or linesearch='backtracking'."
    ),
}


class JaxoptState(eqx.Module):
    """Iterate, jaxopt's own state, and the status."""

    x: PyTree
    inner: Any
    status: Int[Array, ""]


class JaxoptSolver(ForeignSolver):
    """A solver of jaxopt; made by [`jaxopt`][].

    - `kind`: its class. `settings`: fields that are no arrays. `arrays`: those that are.
    - `inside`: the solver within an `AndersonWrapper`.
    """

    adaptive: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    kind: type = eqx.field(static=True)
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    arrays: dict[str, Any]
    inside: "JaxoptSolver | None" = None

    @property
    def family(self) -> Family:
        """How it is told of a problem."""
        return family_of(self.kind) if self.inside is None else self.inside.family

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What it needs of the problem."""
        return self.family.requires

    @property
    def title(self) -> str:
        """The name of its class."""
        return f"jaxopt.{self.kind.__name__}"

    def init(self, problem: BoundProblem, x: PyTree) -> JaxoptState:
        """jaxopt's first state."""
        with defaults_of(x):
            solver, arguments = self._told(problem, x, unroll=False)
            inner = jax.tree.map(_strong, solver.init_state(x, *arguments))
        status = jnp.int32(Status.CONVERGED)
        if self._is(*CONSTRAINED):
            status = jnp.where(is_indicator(problem, x), status, jnp.int32(Status.BREAKDOWN))
        if self._is("Bisection"):
            status = jnp.where(inner.sign == 0, jnp.int32(Status.BREAKDOWN), status)
        return JaxoptState(x, inner, jax.lax.stop_gradient(status))

    def step(self, problem: BoundProblem, state: JaxoptState, residual: PyTree) -> JaxoptState:
        """One update."""

        def updated(pair: Any, *, unroll: bool) -> Any:
            with defaults_of(pair[0]):
                solver, arguments = self._told(problem, pair[0], unroll=unroll)
                after = solver.update(*pair, *arguments)
            return _in_dtypes_of(pair, (after.params, after.state))

        pair = (state.x, state.inner)
        if self._is("LBFGSB"):
            x, inner = forward_only(updated(pair, unroll=False), _NO_REVERSE)
        elif dict(self.settings).get("linesearch") in _NO_REVERSE_SEARCH:
            refusal = _NO_REVERSE_SEARCH[dict(self.settings)["linesearch"]]
            x, inner = forward_only(updated(pair, unroll=False), refusal)
        elif hasattr(self.kind, "maxls"):  # its line search is a loop
            x, inner = evaluated_as(
                lambda pair: updated(pair, unroll=False),
                lambda pair: updated(pair, unroll=True),
                pair,
            )
        else:
            x, inner = updated(pair, unroll=False)
        if self._is("Bisection"):
            # Its ends move by signs alone: their derivative is a zero that the root's is not. The
            # residual depends on θ, so that NaN comes through.
            x = with_derivative_of(x, residual, jnp.full((), jnp.nan, x.dtype))
        return JaxoptState(x, inner, self._status(problem, state, residual, x, inner))

    def residual(self, problem: BoundProblem, state: JaxoptState) -> PyTree:
        """The one that jaxopt evaluated, where it keeps it."""
        if self._has_gradient(state):
            return vector.negative(state.inner.grad)
        return problem.residual(state.x)

    def failure(self, state: JaxoptState) -> Int[Array, ""]:
        """`LINE_SEARCH` or `ROUNDING` where a line search failed and nothing moved."""
        return state.status

    def applications(self, state: JaxoptState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Gradients and mappings that jaxopt counted, and residuals of the loop."""
        for name in ("num_grad_eval", "num_fun_eval"):
            counted = getattr(state.inner, name, None)
            if counted is not None:
                ours = 0 if self._has_gradient(state) else iterations + 1
                return jnp.asarray(counted, jnp.int32) + ours
        return 2 * iterations + 1

    def _told(self, problem: BoundProblem, x: PyTree, *, unroll: bool) -> tuple[Any, Any]:
        """The solver for this problem, and what its methods are called with after x."""
        fields, arguments = self.family.tell(problem, x)
        return self.made(fields, unroll=unroll), arguments

    def made(self, fields: dict[str, Any], *, unroll: bool) -> Any:
        """A solver of jaxopt with these fields and the settings."""
        given = dict(self.settings) | self.arrays
        known = {field.name for field in dataclasses.fields(self.kind)}
        given |= {"unroll": unroll} if "unroll" in known else {}
        if self.inside is not None:
            return self.kind(**given, solver=self.inside.made(fields, unroll=unroll))
        return self.kind(**given, **fields)

    def _is(self, *names: str) -> bool:
        kind = self.kind if self.inside is None else self.inside.kind
        return any(base.__name__ in names for base in kind.__mro__)

    def _has_gradient(self, state: JaxoptState) -> bool:
        real = not any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(state.x))
        return real and self.kind.__name__ in WITH_GRADIENT

    def _status(
        self, problem: BoundProblem, state: JaxoptState, residual: PyTree, x: PyTree, inner: Any
    ) -> Array:
        failed = getattr(inner, "failed_linesearch", None)
        if failed is None:
            return state.status
        before, after, residual = jax.lax.stop_gradient((state.x, x, residual))
        stuck = failed & (vector.norm(vector.subtract(after, before)) == 0)
        norm = vector.norm(residual)
        scale = norm if problem.scale is None else problem.scale
        small = norm <= vector.epsilon(x) ** 0.5 * scale
        reason = jnp.where(small, jnp.int32(Status.ROUNDING), jnp.int32(Status.LINE_SEARCH))
        return jnp.where(stuck & (problem.scale is not None), reason, state.status)


def jaxopt(solver: Any, /, **settings: Any) -> JaxoptSolver:
    """An iterative solver of jaxopt as an inner solver.

    Its `update` is the step: the loop of `bl.solve` drives it to a traced budget and confirms on
    the true residual, so it unrolls, is counted and never compiles anew.  Its own `run`, and with
    it `maxiter`, `tol`, `implicit_diff`, `jit` and `unroll`, is not used; nor is the function that
    it was made with, for the inner problem says what is solved:

    - a `bl.Minimization`: `GradientDescent`, `LBFGS`, `BFGS`, `NonlinearCG`, `PolyakSGD`,
        `ArmijoSGD`, `OptaxSolver`;
    - a `bl.CompositeMinimization`: `ProximalGradient`, `BlockCoordinateDescent` (rows of one
        array); with constraints (`bl.Box`, `bl.NonNegative`, a projection) `ProjectedGradient`,
        `LBFGSB`, `MirrorDescent`;
    - a `bl.FixedPoint`: `FixedPointIteration`, `AndersonAcceleration`;
    - any problem, by its residual: `Broyden`, `GaussNewton`, `LevenbergMarquardt`; with one
        unknown `Bisection`;
    - `AndersonWrapper` of one of these: what that one solves.

    **Arguments:**

    - `solver`: a class of jaxopt, or a solver, whose settings are then taken. Numbers are
        compiled in; arrays among them are traced.
    - `settings`: of a class; the functions are left out.

    **Raises:** `IncompatibleError` for a class that is no inner solver, naming what to use
    instead; `TypeError` for anything else, or a setting that it has not.

    >>> import jaxopt, jax.numpy as jnp, bilevel as bl, bilevel_solvers
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.cosh(x) - theta * x))
    >>> solver = bilevel_solvers.jaxopt(jaxopt.LBFGS, history_size=5)
    >>> solution = bl.solve(problem, 1.0, jnp.zeros(2), solver=solver)
    >>> [round(float(v), 3) for v in solution.value]
    [0.881, 0.881]
    """
    load("jaxopt")
    kind: Any = solver if isinstance(solver, type) else type(solver)
    if not any(base.__module__.startswith("jaxopt.") for base in kind.__mro__):
        hint = " Use bl.Optax." if origin(solver).startswith("optax") else ""
        msg = (
            "bilevel_solvers.jaxopt: solver must be a solver of jaxopt, such as jaxopt.LBFGS, got "
            f"{brief(solver)}.{hint}"
        )
        raise TypeError(msg)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if solver is not kind:
        if settings:
            msg = (
                f"bilevel_solvers.jaxopt: settings ({', '.join(settings)}) go with a class. Write "
                f"jaxopt(jaxopt.{kind.__name__}, ...), or give them to the solver itself."
            )
            raise TypeError(msg)
        settings = {name: getattr(solver, name) for name in fields}
    unknown = [name for name in settings if name not in fields]
    if unknown:
        known = ", ".join(name for name in fields if name not in OURS)
        msg = f"jaxopt.{kind.__name__} has no setting {unknown[0]!r}. It has {known}."
        raise TypeError(msg)
    if kind.__name__ == "AndersonWrapper":
        inside = settings.pop("solver", None)
        return _made_of(kind, settings, jaxopt(inside))
    return _made_of(kind, settings, None)


def _made_of(kind: Any, settings: dict[str, Any], inside: JaxoptSolver | None) -> JaxoptSolver:
    functions = () if inside is not None else family_of(kind).functions
    if "has_aux" in settings or "value_and_grad" in settings:
        # The problem's function returns a value and nothing else.
        settings = settings | dict.fromkeys(("has_aux", "value_and_grad"), False)
        names = {field.name for field in dataclasses.fields(kind)}
        settings = {name: value for name, value in settings.items() if name in names}
    kept = {
        name: value
        for name, value in settings.items()
        if name not in OURS and name not in functions
    }
    if kind.__name__ == "Bisection":
        kept["check_bracket"] = False  # which cannot be traced; the status says it instead
    arrays = {name: value for name, value in kept.items() if eqx.is_array(value)}
    static = tuple(sorted((name, value) for name, value in kept.items() if name not in arrays))
    try:
        hash(static)
    except TypeError:
        msg = (
            f"bilevel_solvers.jaxopt: the settings of {kind.__name__} must be arrays or hashable, "
            f"got {brief(dict(static))}. Write tuples for lists."
        )
        raise TypeError(msg) from None
    return JaxoptSolver(kind, static, arrays, inside)


def _strong(leaf: Any) -> Array:
    array = jnp.asarray(leaf)
    return jnp.asarray(array, array.dtype)


def _in_dtypes_of(before: Any, after: Any) -> Any:
    """The new state in the dtypes of the old: some solvers promote single precision."""
    return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), before, after)
