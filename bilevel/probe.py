"""Numbers out of a backward pass: a zero argument whose cotangent is the report."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


class Probe(eqx.Module):
    """What `bl.solve` did forward and backward, read as a gradient.

    A probe is a pytree of zeros.  Pass it to `bl.solve` (alone, or inside a
    `Fidelity`) and differentiate with respect to it: its cotangent is a `Probe` filled
    with what the primal and adjoint solves did.  It costs nothing and works under jit,
    vmap and inside any outer code.  One probe shared by several solves, or by the
    samples of a vmap, receives the *sum* over them; divide by `solves` for means.

    - `solves`: adjoint solves that reported.
    - `primal_iterations`, `adjoint_iterations`: iterations done.
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

    @classmethod
    def zeros(cls) -> Self:
        """The probe to pass in."""
        return cls(*(jnp.zeros(()) for _ in range(10)))
