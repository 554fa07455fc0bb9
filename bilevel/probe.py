"""Numbers out of a backward pass: a zero argument whose cotangent is the report."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.description import described
from bilevel.solution import Solution


class Probe(eqx.Module):
    """What `bl.solve` did forward and backward, read as a gradient.

    A probe is a pytree of zeros.  Pass it to `bl.solve` (alone, or inside a
    `Fidelity`) and differentiate with respect to it: its cotangent is a `Probe` filled
    with what the primal and adjoint solves did.  It costs nothing and works under jit,
    vmap and inside any outer code.  One probe shared by several solves, or by the
    samples of a vmap, receives the *sum* over them; divide by `solves` for means.

    - `solves`: adjoint solves that reported.
    - `primal_iterations`, `adjoint_iterations`: iterations done, of the linear solver where
        the primal one has one inside (Newton).
    - `primal_applications`, `adjoint_applications`: applications of the residual or
        operator, and of its transpose.
    - `primal_residual`, `adjoint_residual`: residual norms relative to each solve's own
        scale.
    - `primal_capped`, `adjoint_capped`: solves that stopped on their budget.
    - `failures`: solves, primal or adjoint, whose status is a failure.

    All are real scalars, for derivatives are.  Only a backward pass fills them.

    >>> import jax
    >>> int(Probe.zeros().solves)
    0
    """

    solves: Float[Array, ""]
    primal_iterations: Float[Array, ""]
    adjoint_iterations: Float[Array, ""]
    primal_applications: Float[Array, ""]
    adjoint_applications: Float[Array, ""]
    primal_residual: Float[Array, ""]
    adjoint_residual: Float[Array, ""]
    primal_capped: Float[Array, ""]
    adjoint_capped: Float[Array, ""]
    failures: Float[Array, ""]

    def __repr__(self) -> str:
        """The numbers in a line."""
        return described(self)

    @classmethod
    def zeros(cls) -> Self:
        """The probe to pass in."""
        return cls(*(jnp.zeros(()) for _ in range(10)))


class AdjointProbe(eqx.Module):
    """One adjoint solve in full, read as a gradient.

    Like [`Probe`][], but for one solve alone: its cotangent is the adjoint solution λ, the
    residual vector it left, and the numbers of its `Solution`, as real numbers; zeros and
    `NOT_RUN` from an estimator that solves no adjoint. λ is
    what the next adjoint solve may start from (`adjoint_guess`), and with the
    residual `bl.truncation_error` tells what stopping early cost.

    >>> import jax, bilevel as bl
    >>> problem = bl.LinearSystem(lambda theta: theta * jnp.eye(1), jnp.ones(1))
    >>> def loss(theta, probe):
    ...     return jnp.sum(bl.solve(problem, theta, jnp.zeros(1), probe=probe).value)
    >>> report = jax.grad(loss, argnums=1)(2.0, AdjointProbe.zeros(jnp.zeros(1)))
    >>> float(report.value[0]), bl.Status(int(report.status)).name
    (0.5, 'CONVERGED')
    """

    value: PyTree
    residual: PyTree
    status: Float[Array, ""]
    residual_norm: Float[Array, ""]
    iterations: Float[Array, ""]
    tolerance: Float[Array, ""]
    scale: Float[Array, ""]
    rate: Float[Array, ""]
    applications: Float[Array, ""]

    def __repr__(self) -> str:
        """The numbers in a line."""
        return described(self)

    @classmethod
    def zeros(cls, x0: PyTree) -> Self:
        """The probe to pass in.

        **Arguments:**

        - `x0`: the start of the solve, or anything with its structure, shapes and dtypes.
        """
        scalar = jnp.zeros((), vector.real_dtype(x0))
        return cls(vector.zeros_like(x0), vector.zeros_like(x0), *([scalar] * 7))

    def solution(self) -> Solution:
        """The adjoint solve as a `Solution`."""
        return Solution(
            value=self.value,
            status=self.status.astype(jnp.int32),
            residual_norm=self.residual_norm,
            iterations=self.iterations.astype(jnp.int32),
            inner_iterations=self.iterations.astype(jnp.int32),
            tolerance=self.tolerance,
            scale=self.scale,
            rate=self.rate,
            applications=self.applications.astype(jnp.int32),
        )
