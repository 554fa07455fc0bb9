"""Families of jaxopt's solvers: what each asks of an inner problem, and how it is told."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel_solvers.library import load

Told = tuple[dict[str, Any], tuple[Any, ...]]
"""Fields that a solver of jaxopt gets from the problem, and arguments of its methods."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Solvers that are told of a problem in the same way.

    - `requires`: traits of the problem, as in `bl.InnerSolver`.
    - `functions`: their fields that come from the problem; what a user gave there is not used.
    - `tell`: (problem, x) -> what comes from the problem, x being the iterate.
    """

    requires: frozenset[str]
    functions: tuple[str, ...]
    tell: Callable[[BoundProblem, PyTree], Told]


def family_of(kind: type) -> Family:
    """The family of a class of jaxopt's, or of a class that derives from one.

    **Raises:** `IncompatibleError` for a class that has none, naming what to use instead.
    """
    for base in kind.__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
        if base.__name__ in ELSEWHERE:
            msg = f"jaxopt.{kind.__name__} is no inner solver: {ELSEWHERE[base.__name__]}"
            raise IncompatibleError(msg)
    msg = (
        f"jaxopt.{kind.__name__} is none of the solvers that bilevel_solvers.jaxopt knows: "
        f"{', '.join(FAMILIES)}. Derive a bl.InnerSolver whose step calls its update."
    )
    raise IncompatibleError(msg)


def smooth_part(problem: BoundProblem, x: PyTree) -> Callable[[Any], Array]:
    """The objective, without the non-smooth term where there is one.

    **Raises:** `IncompatibleError` for a problem that minimises nothing.
    """
    if problem.proximal is not None:
        return problem.proximal(x).objective
    if problem.objective is None:
        msg = f"MirrorDescent cannot solve this {problem.name}: it needs an objective."
        raise IncompatibleError(msg)
    return problem.objective


def is_indicator(problem: BoundProblem, x: PyTree) -> Array:
    """Whether the non-smooth term is a constraint, whose proximal operator knows no step."""
    assert problem.proximal is not None
    parts = problem.proximal(x)
    size = 1.0 + vector.norm(x)
    told: list[Array] = []
    # A penalty of large weight gives zero for whatever is near, and one of small weight shows
    # in the step's length only: so points from near to far, and steps far apart.
    for reach in (1.0, 1e3, 1e6):
        z = vector.add_scaled(x, reach * size, vector.arbitrary(x, seed=3))
        for step in (1e-6, 1.0):
            change = vector.subtract(parts.proximal(z, step), parts.proximal(z, 2.0 * step))
            told.append(vector.norm(change) <= 1e3 * vector.epsilon(x) * vector.norm(z))
    return jnp.stack(told).all()


def _smooth(problem: BoundProblem, x: PyTree) -> Told:
    del x
    return {"fun": problem.objective}, ()


def _proximal(problem: BoundProblem, x: PyTree) -> Told:
    assert problem.proximal is not None
    parts = problem.proximal(x)

    def proximal(z: PyTree, _: Any, scaling: Any = 1.0) -> PyTree:
        return parts.proximal(z, scaling)

    return {"fun": parts.objective, "prox": proximal}, (None,)


def _projected(problem: BoundProblem, x: PyTree) -> Told:
    assert problem.proximal is not None
    parts = problem.proximal(x)
    projection = {"projection": lambda z, _=None: parts.proximal(z, 1.0)}
    return {"fun": parts.objective, **projection}, (None,)


def _bounded(problem: BoundProblem, x: PyTree) -> Told:
    assert problem.proximal is not None
    parts = problem.proximal(x)
    # The projection of what is infinitely far away is the bound; without one it stays there.
    bounds = tuple(
        parts.proximal(jax.tree.map(lambda leaf, e=end: jnp.full_like(leaf, e), x), 1.0)
        for end in (-jnp.inf, jnp.inf)
    )
    return {"fun": parts.objective}, (bounds,)


def _mirrored(problem: BoundProblem, x: PyTree) -> Told:
    return {"fun": smooth_part(problem, x)}, (None,)


def _blockwise(problem: BoundProblem, x: PyTree) -> Told:
    if not isinstance(x, jax.Array) or x.ndim == 0:
        msg = "jaxopt.BlockCoordinateDescent needs x to be one array, whose rows are the blocks."
        raise IncompatibleError(msg)
    assert problem.proximal is not None
    parts = problem.proximal(x)
    rows = _Rows()

    def block_proximal(row: Array, _: Any, scaling: Any = 1.0) -> Array:
        # jaxopt does not say which row it is; the operator was asked for its gradient just now.
        whole = jnp.zeros_like(x).at[rows.last].set(row)
        return parts.proximal(whole, scaling)[rows.last]

    curvatures = _curvatures(parts.gradient, x)
    objective = _separated(parts.objective, rows, curvatures)
    return {"fun": objective, "block_prox": block_proximal}, (None,)


class _Rows:
    """The identity as jaxopt's linear operator, which remembers the row it was asked for."""

    last: Any = 0

    def matvec(self, x: Array) -> Array:
        return x

    def rmatvec_element(self, x: Array, index: Any) -> Array:
        self.last = index
        return x[index]

    def update_matvec(self, x: Array, change: Array, index: Any) -> Array:
        return x.at[index].add(change)


def _separated(objective: Callable[[Any], Array], rows: _Rows, curvatures: Array) -> Any:
    """The objective in the one form that jaxopt's coordinate descent takes."""
    base: Any = load("jaxopt.objective").CompositeLinearFunction

    class Separated(base):
        def subfun(self, predictions: Array) -> Array:
            return objective(predictions)

        def make_linop(self) -> _Rows:
            return rows

        def columnwise_lipschitz_const(self) -> Array:
            return curvatures

    return Separated()


def _curvatures(gradient: Callable[[Any], Any], x: Array) -> Array:
    """The largest curvature within each row at x, from products with the Hessian.

    Blocks of several entries get the largest row sum in modulus, which no eigenvalue exceeds.
    """
    _, hessian = jax.linearize(gradient, x)
    units = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    images = jax.vmap(hessian)(units).reshape(x.shape[0], -1, x.shape[0], x[0].size)
    blocks = jnp.abs(jnp.einsum("iaib->iab", images)).sum(axis=2).max(axis=1)
    return jnp.where(blocks > 0, blocks, 1.0)


def _mapped(problem: BoundProblem, x: PyTree) -> Told:
    del x
    return {"fixed_point_fun": problem.mapping}, ()


def _uphill(problem: BoundProblem, field: str) -> Told:
    return {field: lambda x: vector.negative(problem.residual(x))}, ()


_NO_TRAITS: frozenset[str] = frozenset()
_OBJECTIVE, _PROXIMAL = frozenset({"objective"}), frozenset({"proximal"})

_SMOOTH = Family(_OBJECTIVE, ("fun",), _smooth)
_MAPPED = Family(frozenset({"mapping"}), ("fixed_point_fun",), _mapped)
_LEAST_SQUARES = Family(
    _NO_TRAITS, ("residual_fun", "jac_fun"), lambda problem, _: _uphill(problem, "residual_fun")
)

FAMILIES = {
    "GradientDescent": _SMOOTH,
    "LBFGS": _SMOOTH,
    "BFGS": _SMOOTH,
    "NonlinearCG": _SMOOTH,
    "PolyakSGD": _SMOOTH,
    "ArmijoSGD": _SMOOTH,
    "OptaxSolver": _SMOOTH,
    "ProximalGradient": Family(_PROXIMAL, ("fun", "prox"), _proximal),
    "ProjectedGradient": Family(_PROXIMAL, ("fun", "projection"), _projected),
    "LBFGSB": Family(_PROXIMAL, ("fun",), _bounded),
    "BlockCoordinateDescent": Family(_PROXIMAL, ("fun", "block_prox"), _blockwise),
    "MirrorDescent": Family(_NO_TRAITS, ("fun",), _mirrored),
    "FixedPointIteration": _MAPPED,
    "AndersonAcceleration": _MAPPED,
    "Broyden": Family(_NO_TRAITS, ("fun",), lambda problem, _: _uphill(problem, "fun")),
    "Bisection": Family(
        _NO_TRAITS, ("optimality_fun",), lambda problem, _: _uphill(problem, "optimality_fun")
    ),
    "GaussNewton": _LEAST_SQUARES,
    "LevenbergMarquardt": _LEAST_SQUARES,
}
"""By the name of the class: a subclass has its base's. Roots are what least squares find."""

CONSTRAINED = ("ProjectedGradient", "LBFGSB")
"""Those that take a non-smooth term for a constraint."""

_QUADRATIC = (
    "it solves a quadratic program of its own form, with its multipliers. Use "
    "bl.CompositeMinimization with bl.Box, and ProjectedGradient or LBFGSB."
)
_LINE_SEARCH = "a line search is a part of one. Use LBFGS, BFGS or NonlinearCG."
_ON_HOST = "it runs SciPy outside of traced code. Use bilevel_solvers.scipy_{}."

ELSEWHERE = {
    "BoxCDQP": _QUADRATIC,
    "BoxOSQP": _QUADRATIC,
    "OSQP": _QUADRATIC,
    "CvxpyQP": _QUADRATIC,
    "EqualityConstrainedQP": _QUADRATIC,
    "IterativeLineSearch": _LINE_SEARCH,
    "IterativeRefinement": "it refines a linear solve. Use bl.Direct, which does.",
    "ScipyMinimize": _ON_HOST.format("minimize"),
    "ScipyBoundedMinimize": _ON_HOST.format("minimize"),
    "ScipyLeastSquares": _ON_HOST.format("root"),
    "ScipyBoundedLeastSquares": _ON_HOST.format("root"),
    "ScipyRootFinding": _ON_HOST.format("root"),
}
"""What is no inner solver, and why."""
