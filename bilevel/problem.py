"""Inner problems: what is solved, F(x, θ) = 0."""

import abc
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.operator import as_operator
from bilevel.signature import brief, check_callable

_X_THETA = ("x", "theta")


class InnerProblem(eqx.Module):
    """The equation F(x, θ) = 0 that defines x*(θ); subclass it for a problem of your own.

    A subclass says what F is, and JAX does the rest.  The shortest one:

    >>> import jax.numpy as jnp
    >>> import bilevel as bl
    >>> class Cube(bl.InnerProblem):
    ...     def residual(self, x, theta):
    ...         return x**3 - theta
    >>> solution = bl.solve(Cube(), 8.0, 1.5)
    >>> round(float(solution.value), 4)
    2.0

    Any object with a method `residual(x, theta)` is an inner problem too; attributes
    `symmetric` and `positive_definite` say of which kind the Jacobian ∂F/∂x is, and
    solvers that need such a kind then accept it.  Solvers see the problem at one θ, with
    a residual that points downhill: docs/custom.md explains the signs, and
    `bilevel.testing.check_inner_problem` checks a problem.
    """

    @abc.abstractmethod
    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """F(x, θ), like x, zero at the solution."""

    def anchored(self, theta: PyTree, x: PyTree) -> "InnerProblem":
        """The same problem with what it measures once, at the start of a solve; or itself."""
        del theta, x
        return self

    def equation(self, x: PyTree) -> "InnerProblem":
        """The equation whose derivative is taken: the problem's own, or a better one.

        Another one must have the same solution for every θ.
        """
        del x
        return self

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem at one θ, as solvers see it."""
        return BoundProblem(
            name=type(self).__name__,
            theta=theta,
            residual=lambda x: vector.negative(self.residual(x, theta)),
            symmetric=getattr(self, "symmetric", None),
            positive_definite=getattr(self, "positive_definite", None),
        )


@runtime_checkable
class HasResidual(Protocol):
    """The least an inner problem of another library must have.

    >>> class Shift:
    ...     def residual(self, x, theta):
    ...         return x - theta
    >>> isinstance(Shift(), HasResidual)
    True
    """

    def residual(self, x: Any, theta: Any) -> Any:
        """F(x, θ), like x, zero at the solution."""
        ...


class Minimization(InnerProblem):
    """x*(θ) = argmin over x of an objective, by its stationarity F = ∂ₓ objective = 0.

    **Arguments:**

    - `objective`: objective(x, theta) -> real scalar, smooth in x.

    The Hessian is symmetric, and positive definite at a strict minimiser, which the
    solvers of the adjoint make use of.  For complex x the gradient is the direction of
    steepest ascent.

    >>> import jax, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: (x - theta) ** 2)
    >>> round(float(jax.grad(lambda t: bl.solve(problem, t, 0.0).value)(3.0)), 4)
    1.0
    """

    objective: Callable[[Any, Any], Any]

    def __check_init__(self) -> None:
        """The objective can be called as it will be."""
        check_callable(type(self).__name__, "objective", self.objective, _X_THETA)

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """The gradient of the objective in x, uphill; solvers see minus this, downhill."""
        return vector.conjugate(jax.grad(self._scalar)(x, theta))

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem at one θ, as solvers see it."""
        return BoundProblem(
            name=type(self).__name__,
            theta=theta,
            residual=lambda x: vector.negative(self.residual(x, theta)),
            objective=lambda x: self._scalar(x, theta),
            symmetric=True,
            positive_definite=True,
        )

    def _scalar(self, x: PyTree, theta: PyTree) -> Array:
        value = jnp.asarray(self.objective(x, theta))
        if value.ndim != 0 or not jnp.issubdtype(value.dtype, jnp.floating):
            msg = (
                f"Minimization: objective(x, theta) must return a real scalar, got shape "
                f"{value.shape} of {value.dtype}. Sum over the samples, and take .real of a "
                "complex value."
            )
            raise TypeError(msg)
        return value


class RootFinding(InnerProblem):
    """x*(θ) with residual(x*, θ) = 0.

    **Arguments:**

    - `function`: residual(x, theta) -> like x, zero at the solution.
    - `symmetric`, `positive_definite`: of which kind its Jacobian in x is, if known.

    >>> import bilevel as bl
    >>> problem = bl.RootFinding(lambda x, theta: x * x - theta)
    >>> round(float(bl.solve(problem, 2.0, 1.0).value), 4)
    1.4142
    """

    function: Callable[[Any, Any], Any]
    symmetric: bool | None = eqx.field(static=True, default=None)
    positive_definite: bool | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """The function can be called as it will be."""
        check_callable(type(self).__name__, "function", self.function, _X_THETA)

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """The user's residual."""
        return self.function(x, theta)


class FixedPoint(InnerProblem):
    """x*(θ) with x* = mapping(x*, θ), so F = mapping(x, θ) - x.

    **Arguments:**

    - `mapping`: mapping(x, theta) -> like x; a contraction in x near the solution.
    - `symmetric`: whether the Jacobian of the mapping in x is symmetric, if known.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.FixedPoint(lambda x, theta: theta * jnp.cos(x))
    >>> round(float(bl.solve(problem, 1.0, 0.5).value), 4)
    0.7391
    """

    mapping: Callable[[Any, Any], Any]
    symmetric: bool | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """The mapping can be called as it will be."""
        check_callable(type(self).__name__, "mapping", self.mapping, _X_THETA)

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """The mapping minus the identity."""
        return vector.subtract(self.mapping(x, theta), x)

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem at one θ, as solvers see it."""
        return BoundProblem(
            name=type(self).__name__,
            theta=theta,
            residual=lambda x: self.residual(x, theta),
            mapping=lambda x: self.mapping(x, theta),
            symmetric=self.symmetric,
        )


class LinearSystem(InnerProblem):
    """x*(θ) with A(θ) x* = b(θ), so F = b - A x.

    **Arguments:**

    - `operator`: operator(theta) -> a square matrix, a matvec function v -> A v, a pair
        (matvec, rmatvec) with rmatvec v -> Aᴴ v, or an object with `matvec` and
        optionally `rmatvec` and `diagonal`; or, where it does not depend on θ, the
        matrix or object itself. No dense matrix is ever formed of it unless the solver
        is `Direct`.
    - `rhs`: rhs(theta) -> b, like x; or b itself.
    - `symmetric`, `positive_definite`: whether A is so. `None`: unknown, or what the
        operator object says of itself; a constant matrix is looked at.

    The tolerance of a budget is relative to the norm of b.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> problem = bl.LinearSystem(A, lambda theta: theta * jnp.ones(2))
    >>> solution = bl.solve(problem, 5.0, jnp.zeros(2))
    >>> [round(float(v), 4) for v in solution.value]
    [2.0, 1.0]
    """

    operator: Any
    rhs: Any
    symmetric: bool | None = eqx.field(static=True, default=None)
    positive_definite: bool | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        operator: object,
        rhs: object,
        *,
        symmetric: bool | None = None,
        positive_definite: bool | None = None,
    ):
        _check_operator(operator)
        if callable(rhs):
            check_callable("LinearSystem", "rhs", rhs, ("theta",))
        elif rhs is None or isinstance(rhs, str | bytes):
            msg = f"LinearSystem: rhs should be an array or a function of theta, got {brief(rhs)}."
            raise TypeError(msg)
        self.operator = operator
        self.rhs = rhs
        if symmetric is None and _is_concrete_matrix(operator):
            matrix: Any = operator
            rounding = 100 * vector.epsilon(jnp.asarray(matrix) * 1.0)
            largest = abs(matrix).max()
            # Of a matrix that is not finite nothing can be seen: the status will tell.
            if bool(jnp.isfinite(largest)):
                symmetric = bool((abs(matrix - matrix.conj().T) <= rounding * largest).all())
        self.symmetric = symmetric
        self.positive_definite = positive_definite

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """The residual b - A x."""
        return self.at(theta).residual(x)

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem at one θ: operator and right-hand side are evaluated once."""
        operator = as_operator(
            self.operator(theta) if _is_function(self.operator) else self.operator,
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
        )
        rhs = self.rhs(theta) if callable(self.rhs) else self.rhs
        rhs = jax.tree.map(jnp.asarray, rhs)
        return BoundProblem(
            name=type(self).__name__,
            theta=theta,
            residual=lambda x: vector.subtract(rhs, operator.matvec(x)),
            operator=operator,
            rhs=rhs,
            symmetric=operator.symmetric,
            positive_definite=operator.positive_definite,
            matrix_free=operator.matrix is None,
        )


class _Structural(InnerProblem):
    """An object of someone else's that has a residual."""

    target: Any

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        return self.target.residual(x, theta)

    def at(self, theta: PyTree) -> BoundProblem:
        if callable(getattr(self.target, "at", None)):
            return self.target.at(theta)
        return BoundProblem(
            name=type(self.target).__name__,
            theta=theta,
            residual=lambda x: vector.negative(self.target.residual(x, theta)),
            symmetric=getattr(self.target, "symmetric", None),
            positive_definite=getattr(self.target, "positive_definite", None),
        )


def as_inner_problem(problem: object) -> InnerProblem:
    """The problem itself, or an object with a `residual` method made into one.

    **Raises:** `TypeError` for anything else, naming the four kinds.
    """
    if isinstance(problem, InnerProblem):
        return problem
    if isinstance(problem, type):
        msg = (
            f"problem must be an instance, got the class {problem.__name__}. "
            f"Write {problem.__name__}(...)."
        )
        raise TypeError(msg)
    if callable(getattr(problem, "residual", None)):
        return _Structural(problem)
    msg = (
        "problem must be an InnerProblem or have a method residual(x, theta), got "
        f"{type(problem).__name__}. Wrap a function in Minimization(objective), "
        "RootFinding(residual), FixedPoint(mapping) or LinearSystem(operator, rhs)."
    )
    raise TypeError(msg)


def _is_function(operator: object) -> bool:
    """Whether an operator is a function of θ, which a class of operators is, too."""
    return callable(operator) and (
        isinstance(operator, type) or not callable(getattr(operator, "matvec", None))
    )


def _check_operator(operator: object) -> None:
    if operator is None or isinstance(operator, str | bytes | bool | int | float):
        msg = (
            "LinearSystem: operator must be a function of theta, a square matrix or an object "
            f"with a matvec method, got {operator!r}."
        )
        raise TypeError(msg)
    if _is_function(operator):
        check_callable("LinearSystem", "operator", operator, ("theta",))
    elif not isinstance(operator, jax.Array | np.ndarray):
        as_operator(operator)


def _is_concrete_matrix(operator: object) -> bool:
    if not isinstance(operator, jax.Array | np.ndarray) or isinstance(operator, Tracer):
        return False
    return operator.ndim == 2 and operator.shape[0] == operator.shape[1] and operator.size > 0
