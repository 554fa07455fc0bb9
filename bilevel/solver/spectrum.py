"""How much a linear operator stretches: norm, largest eigenvalue, contraction rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.operator import LinearOperator
from bilevel.solver.lanczos import extreme_eigenvalues, random_vector
from bilevel.solver.parameter import whole

STEPS = 20
"""Steps of an estimate, unless told."""


def largest_eigenvalue(
    operator: LinearOperator, like: PyTree, steps: int = STEPS
) -> Float[Array, ""]:
    """Estimate the largest modulus of an eigenvalue; a constant, without a derivative.

    Lanczos where the operator is declared symmetric, from below and good to a few per cent
    after 20 steps; the power iteration of [`contraction_rate`][] otherwise.

    **Arguments:**

    - `like`: a vector of the space, for structure, shapes and dtypes.
    - `steps`: operator applications, static.

    >>> import jax.numpy as jnp
    >>> operator = LinearOperator(lambda v: jnp.array([1.0, -3.0]) * v, symmetric=True)
    >>> round(float(largest_eigenvalue(operator, jnp.zeros(2))), 3)
    3.0
    """
    if not operator.symmetric:
        return contraction_rate(operator.matvec, like, steps)
    found = extreme_eigenvalues(operator.matvec, like, steps)
    return jnp.maximum(jnp.abs(found.smallest), jnp.abs(found.largest))


def largest_singular_value(
    operator: LinearOperator, like: PyTree, steps: int = STEPS
) -> Float[Array, ""]:
    """Estimate ‖A‖₂, the Lipschitz constant of v -> A v; a constant, without a derivative.

    Lanczos on AᴴA, hence from below.

    **Arguments:**

    - `like`: a vector of the space, for structure, shapes and dtypes.
    - `steps`: applications of the operator, and as many of its adjoint, static.

    >>> import jax.numpy as jnp
    >>> operator = LinearOperator(lambda v: jnp.array([[0.0, 2.0], [0.0, 0.0]]) @ v)
    >>> round(float(largest_singular_value(operator, jnp.zeros(2))), 3)
    2.0
    """
    adjoint = operator.adjoint_matvec(like)
    found = extreme_eigenvalues(lambda v: adjoint(operator.matvec(v)), like, steps)
    return jnp.sqrt(jnp.maximum(found.largest, 0.0))


def contraction_rate(
    matvec: Callable[[Any], Any], like: PyTree, steps: int = STEPS
) -> Float[Array, ""]:
    """Estimate the spectral radius of a linear map, symmetric or not, without a derivative.

    The mean growth of a random vector an application, over the second half of a power
    iteration: a mean, because a pair of complex eigenvalues lets single factors oscillate.
    Below 1 the map contracts in the long run.

    **Arguments:**

    - `matvec`: v -> T v.
    - `like`: a vector of the space, for structure, shapes and dtypes.
    - `steps`: applications, static, at least 2.

    **Returns:** a real scalar; 0 for a nilpotent map that `steps` applications annihilate.

    >>> import jax.numpy as jnp
    >>> rotation = 0.5 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    >>> round(float(contraction_rate(lambda v: rotation @ v, jnp.zeros(2))), 3)
    0.5
    """
    whole("contraction_rate", "steps", steps, low=2)
    dtype = vector.real_dtype(like)

    def step(v: Any, _: None) -> tuple[Any, Array]:
        v = matvec(v)
        norm = vector.norm(v)
        # 0 stays 0; NaN is not 0 and flows on.
        inverse = jnp.where(norm == 0, 0.0, 1.0) / jnp.where(norm == 0, 1.0, norm)
        return vector.scale(inverse, v), norm.astype(dtype)

    start = random_vector(like)
    start = vector.scale(1.0 / vector.norm(start), start)
    _, norms = jax.lax.scan(step, start, length=steps)
    late = jax.lax.stop_gradient(norms[steps // 2 :])
    return jnp.exp(jnp.mean(jnp.log(late)))
