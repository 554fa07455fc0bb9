"""An inner problem with everything it captured brought into the open."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.operator import LinearOperator
from bilevel.problem import InnerProblem


class ClosedProblem(eqx.Module):
    """An inner problem at one θ whose array leaves are all it depends on.

    A user's functions may capture arrays, θ itself among them.  JAX's custom rules see
    only their arguments, so a captured θ would get a zero gradient there, or a leaked
    tracer.  Here every captured array is a leaf, hence an argument.
    """

    residual: Callable[[Any], Any]
    rmatvec: Callable[[Any], Any] | None
    parts: Callable[[], tuple[PyTree | None, Array | None, Any, PyTree | None]] | None
    near: Callable[[Any], Any] | None
    symmetric: bool | None = eqx.field(static=True)
    positive_definite: bool | None = eqx.field(static=True)
    linear: bool = eqx.field(static=True)
    real_linear: bool = eqx.field(static=True)

    def operator(self, x: PyTree) -> LinearOperator:
        """N at x, with the transpose, diagonal, matrix and source that the problem offers.

        Linearising once hoists all that does not depend on the vector out of the solver's
        loop, the user's assembly of A(θ) included.
        """
        _, derivative = jax.linearize(self.residual, x)
        rmatvec = None
        if self.rmatvec is not None:
            _, rmatvec = jax.linearize(self.rmatvec, x)
        diagonal, matrix, source, kernel = (None,) * 4 if self.parts is None else self.parts()
        if self.near is not None:
            source = self.near(x)
        return LinearOperator(
            matvec=lambda v: vector.negative(derivative(v)),
            rmatvec=rmatvec,
            diagonal=diagonal,
            matrix=matrix,
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
            real_linear=self.real_linear,
            source=source,
            kernel=kernel,
        )


def close(problem: InnerProblem, theta: PyTree, x0: PyTree) -> ClosedProblem:
    """Bring everything that a problem captured into the open.

    **Arguments:**

    - `x0`: an unknown of the right structure, shapes and dtypes; its values do not matter.
    """
    bound = problem.at(theta)
    rmatvec: Any = None
    parts: Any = None
    operator = bound.operator
    if operator is not None:
        if operator.rmatvec is not None and not operator.symmetric:
            rmatvec = eqx.filter_closure_convert(lambda v: _rmatvec(problem.at(theta), v), x0)
        if any(part is not None for part in _parts(bound)):
            parts = eqx.filter_closure_convert(lambda: _parts(problem.at(theta)))
    return ClosedProblem(
        residual=eqx.filter_closure_convert(lambda x: problem.at(theta).residual(x), x0),
        rmatvec=rmatvec,
        parts=parts,
        near=None if bound.near is None else eqx.filter_closure_convert(_near(problem, theta), x0),
        symmetric=bound.symmetric,
        positive_definite=bound.positive_definite,
        linear=operator is not None,
        real_linear=operator is None or operator.real_linear,
    )


def _rmatvec(bound: BoundProblem, v: PyTree) -> PyTree:
    assert bound.operator is not None
    assert bound.operator.rmatvec is not None
    return bound.operator.rmatvec(v)


def _near(problem: InnerProblem, theta: PyTree) -> Callable[[Any], Any]:
    def near(x: Any) -> Any:
        function = problem.at(theta).near
        assert function is not None
        return function(x)

    return near


def _parts(bound: BoundProblem) -> tuple[PyTree | None, Array | None, Any, PyTree | None]:
    operator = bound.operator
    assert operator is not None
    return operator.diagonal, operator.matrix, operator.source, operator.kernel


def stopped(tree: Any) -> Any:
    """The tree with no derivative through any array of it."""
    dynamic, static = eqx.partition(tree, eqx.is_array)
    # Of a traced Python number JAX gives the bare number, which is an array no more.
    still = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf),
        jax.lax.stop_gradient(dynamic),
    )
    return eqx.combine(still, static)
