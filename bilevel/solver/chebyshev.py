"""Chebyshev iteration."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.lanczos import extreme_eigenvalues
from bilevel.solver.parameter import number, positive, whole
from bilevel.solver.preconditioning import precondition, prepare_preconditioner
from bilevel.status import Status

CAUTION = 4.0
"""How far below the smallest Ritz value the lower end may be put."""


class ChebyshevState(eqx.Module):
    """Iterate, last displacement, weight of the recursion, and the interval.

    The interval comes as its centre c and the square of its half-width over c.
    """

    x: PyTree
    displacement: PyTree
    weight: Float[Array, ""]
    centre: Float[Array, ""]
    spread: Float[Array, ""]
    status: Int[Array, ""]


class Chebyshev(InnerSolver):
    """Chebyshev semi-iteration for a symmetric positive definite linear system.

    Golub and Varga 1961: the polynomial that is smallest on an interval around the
    spectrum.  As fast as conjugate gradients in the worst case, without inner products,
    and linear in the right-hand side, so that truncated solves and their derivatives are
    those of a fixed matrix.  A lower end that is too large slows it down; an upper end below
    the largest eigenvalue makes it diverge, which the status says.

    **Arguments:**

    - `lower`, `upper`: an interval with all eigenvalues of M⁻¹A, 0 < lower <= upper.
        Traced. Where one is `None`, it is estimated once before the iteration; estimates
        are taken as constants by every derivative.
    - `lanczos_steps`: operator applications for the estimate, static.
    - `preconditioner`: v -> M⁻¹v, symmetric positive definite; or an object with
        `at(problem, x)` that returns such a function.

    An estimate that is not positive ends the solve with `BREAKDOWN`.

    **Raises:** `ValueError` for an interval that is empty or not positive.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.diag(jnp.array([1.0, 2.0])), jnp.ones(2))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.Chebyshev(1.0, 2.0))
    >>> [round(float(v), 4) for v in solution.value]
    [1.0, 0.5]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator", "symmetric", "positive_definite"})
    linear_adjoint: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    lower: Float[Array, ""] | float | None = None
    upper: Float[Array, ""] | float | None = None
    lanczos_steps: int = eqx.field(static=True, default=20)
    preconditioner: Any = None

    def __check_init__(self) -> None:
        """Validate the interval where it is concrete."""
        whole("Chebyshev", "lanczos_steps", self.lanczos_steps)
        ends: list[float | None] = []
        for name in ("lower", "upper"):
            end = getattr(self, name)
            if end is not None:
                positive("Chebyshev", name, end)
                ends.append(number("Chebyshev", name, end))
        if len(ends) == 2 and ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
            msg = (
                f"Chebyshev: lower must not exceed upper, got {ends[0]} and {ends[1]}. They are "
                "the ends of an interval with all eigenvalues."
            )
            raise ValueError(msg)

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> ChebyshevState:
        """Find the interval where it was not given."""
        lower, upper = self._interval(problem, x)
        centre, half = (upper + lower) / 2, (upper - lower) / 2
        sound = (lower > 0) & (upper >= lower)
        # NaN is no breakdown: it flows on into the residual, where the loop sees it.
        broken = (lower <= 0) | (upper < lower)
        spread = jnp.where(sound, (half / jnp.where(sound, centre, 1.0)) ** 2, jnp.nan)
        return ChebyshevState(
            x=x,
            displacement=vector.zeros_like(x),
            weight=jnp.zeros_like(centre),
            centre=centre,
            spread=spread,
            status=jnp.where(broken, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.CONVERGED)),
        )

    def step(
        self, problem: BoundProblem, state: ChebyshevState, residual: PyTree
    ) -> ChebyshevState:
        """The three-term recursion: part of the last displacement, and a Richardson step."""
        # Before the first step the weight is 0, which gives 1; the second starts from 2.
        weight = 1.0 / (1.0 - state.spread * state.weight / 4)
        step = vector.scale(weight / state.centre, precondition(problem, residual))
        displacement = vector.add_scaled(step, weight - 1.0, state.displacement)
        return ChebyshevState(
            x=vector.add(state.x, displacement),
            displacement=displacement,
            weight=jnp.where(state.weight == 0, 2.0, weight),
            centre=state.centre,
            spread=state.spread,
            status=state.status,
        )

    def failure(self, state: ChebyshevState) -> Int[Array, ""]:
        """`BREAKDOWN` where the estimated spectrum is not positive."""
        return state.status

    def applications(self, state: ChebyshevState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """One an iteration, and those of the estimate."""
        del state
        estimated = self.lower is None or self.upper is None
        return iterations + 1 + (self.lanczos_steps if estimated else 0)

    def _interval(self, problem: BoundProblem, x: PyTree) -> tuple[Array, Array]:
        dtype = vector.real_dtype(x)
        lower, upper = self.lower, self.upper
        if lower is None or upper is None:
            assert problem.operator is not None
            found = extreme_eigenvalues(
                problem.operator.matvec,
                jax.lax.stop_gradient(x),
                self.lanczos_steps,
                problem.precondition,
            )
            if lower is None:
                # A Ritz value that has not settled is too large. Too small an end costs less.
                settled = found.smallest - found.uncertainty
                lower = jnp.maximum(settled, found.smallest / CAUTION)
            upper = found.upper if upper is None else upper
        return jnp.asarray(lower, dtype), jnp.asarray(upper, dtype)
