"""An inner problem at one θ: what a solver sees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.operator import LinearOperator


@dataclasses.dataclass(frozen=True)
class BoundProblem:
    """An inner problem at one θ, in the one form that every solver works on.

    - `residual`: x -> r, oriented *downhill*: -∂ₓ objective, -residual(x, θ),
        mapping(x, θ) - x, or b - A x. A step x + α r with a small α > 0 moves towards the
        solution, whichever kind the problem is of, and N = -∂r/∂x is the natural
        operator of the kind: the Hessian, the Jacobian, I - T', or A.
    - `objective`, `mapping`, `operator`, `rhs`, `proximal`: what the kind has besides;
        `None` where it has none.
    - `symmetric`, `positive_definite`: of which kind N is; `None` for unknown.
    - `matrix_free`: whether no default may make the operator dense.
    - `precondition`: v -> M⁻¹ v, set by solvers that were given a preconditioner.
    - `target`: the residual norm at which the caller will stop, for solvers whose
        iteration is a cycle of smaller ones; `None` where nobody said.
    - `scale`, `cap`: the residual norm that relative tolerances refer to, and the most
        iterations that the caller will do; `theta`: the θ. For solvers whose step is a whole
        run of somebody else's code; `None` where nobody said.
    - `near`: x -> what preconditioners find as the source of N at x: an object that knows
        the structure of an operator near N, where N itself has none to show.
    """

    name: str
    residual: Callable[[Any], Any]
    objective: Callable[[Any], Array] | None = None
    mapping: Callable[[Any], Any] | None = None
    operator: LinearOperator | None = None
    rhs: PyTree | None = None
    proximal: Any | None = None
    symmetric: bool | None = None
    positive_definite: bool | None = None
    matrix_free: bool = False
    precondition: Callable[[Any], Any] | None = None
    target: Array | None = None
    scale: Array | None = None
    cap: Array | None = None
    theta: PyTree | None = None
    near: Callable[[Any], Any] | None = None

    def linearize(self, x: PyTree) -> LinearOperator:
        """N at x; exact and free for a linear system."""
        if self.operator is not None:
            return self.operator
        _, derivative = jax.linearize(self.residual, x)
        return LinearOperator(
            matvec=lambda v: vector.negative(derivative(v)),
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
            real_linear=True,
            source=None if self.near is None else self.near(x),
        )

    def reference(self, first_residual: Array) -> Array:
        """The norm that relative tolerances of a linear system refer to.

        ‖b‖ for b ≠ 0, so that a good start is not punished; the norm of the first residual
        otherwise. Never an absolute constant: multiplying the problem by a number changes
        nothing.
        """
        if self.rhs is None:
            return first_residual
        rhs_norm = vector.norm(self.rhs).astype(first_residual.dtype)
        return jnp.where(rhs_norm > 0, rhs_norm, first_residual)

    def complex_linear(self, x: PyTree) -> bool:
        """Whether N is linear over the complex numbers, in the space of x.

        A space with real and complex leaves is a real one: a complex factor would lead out
        of it.
        """
        linear = self.operator is not None and not self.operator.real_linear
        return linear and all(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x))

    def inner_product(self, x: PyTree, y: PyTree) -> Array:
        """⟨x, y⟩; its real part where N is linear over the reals only."""
        return vector.complex_dot(x, y) if self.complex_linear(x) else vector.dot(x, y)
