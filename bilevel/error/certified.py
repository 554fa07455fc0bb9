"""Certified bound of the truncation error, from constants the user vouches for."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel import vector
from bilevel.error.base import ErrorEstimator, Situation, TruncationError
from bilevel.solver.parameter import number, positive
from bilevel.status import Status


class CertifiedBound(ErrorEstimator):
    """An upper bound of the truncation error that always holds, given true constants.

    The a-posteriori bound of Ehrhardt and Roberts 2023, extended to objectives that are
    not quadratic.  With ε = ‖r‖/μ ≥ ‖x - x*‖ and η = ‖∂ₓf - Nᵀλ‖/μ,

        adjoint ≤ ‖B‖ η,
        primal  ≤ L_fθ ε + L_B ε Λ + (‖B‖ + L_B ε)(L_f + L_H Λ) ε / μ,   Λ = ‖λ‖ + η,

    where B = ∂_θ r at the iterate.  For a quadratic inner and a quadratic outer problem
    this is ‖B‖‖r_adj‖/μ + L_f‖B‖‖r‖/μ².  It is loose by about the condition number; use
    `ResidualCorrection` for an estimate and this where a guarantee is needed.  It
    refers to an estimator that solves an adjoint (Implicit, Neumann, Nystrom).

    **Arguments** (all real, in the units of the problem):

    - `strong_convexity`: μ > 0, a lower bound of the eigenvalues of N everywhere (of its
        singular values where N is not symmetric).
    - `outer_lipschitz`: L_f, Lipschitz constant of ∂ₓf in x.
    - `cross_norm`: ‖B‖ at the iterate, an upper bound of its spectral norm.
    - `hessian_lipschitz`: L_H, of N in x; 0 for a quadratic inner objective.
    - `cross_lipschitz`: L_B, of ∂_θ r in x; 0 where the inner objective has no term that is
        quadratic in x times θ.
    - `outer_cross_lipschitz`: L_fθ, of ∂_θf in x; 0 where f does not depend on θ directly.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    >>> bound = CertifiedBound(strong_convexity=2.0, outer_lipschitz=2.0, cross_norm=2.0)
    >>> result = bl.hypergradient(
    ...     lambda x, theta: jnp.sum(x**2),
    ...     problem,
    ...     jnp.ones(1),
    ...     jnp.zeros(1),
    ...     solver=bl.GradientDescent(step_size=0.25),
    ...     budget=bl.Budget(iterations=2),
    ...     error=bound,
    ... )
    >>> round(float(result.error.total), 3)  # the gradient is 1.5 instead of 2
    0.5
    """

    strong_convexity: Float[Array, ""] | float
    outer_lipschitz: Float[Array, ""] | float
    cross_norm: Float[Array, ""] | float
    hessian_lipschitz: Float[Array, ""] | float = 0.0
    cross_lipschitz: Float[Array, ""] | float = 0.0
    outer_cross_lipschitz: Float[Array, ""] | float = 0.0

    def __check_init__(self) -> None:
        """Validate the constants where they are concrete."""
        positive("CertifiedBound", "strong_convexity", self.strong_convexity)
        for name in (
            "outer_lipschitz",
            "cross_norm",
            "hessian_lipschitz",
            "cross_lipschitz",
            "outer_cross_lipschitz",
        ):
            given = number("CertifiedBound", name, getattr(self, name))
            if given is not None and not given >= 0:
                msg = f"CertifiedBound: {name} must be at least 0, got {given}."
                raise ValueError(msg)

    def estimate(self, situation: Situation) -> TruncationError:
        """The bound; infinite where the estimator solved no adjoint."""
        bound = situation.problem.at(situation.with_theta(situation.theta))
        mu = self.strong_convexity
        distance = vector.norm(bound.residual(situation.x)) / mu
        if situation.adjoint_residual is None or situation.adjoint_value is None:
            infinite = jnp.full_like(distance, jnp.inf)
            return TruncationError(infinite, infinite, infinite, jnp.int32(1))
        left = vector.norm(situation.adjoint_residual) / mu
        multiplier = vector.norm(situation.adjoint_value) + left
        adjoint = self.cross_norm * left
        cross = self.cross_norm + self.cross_lipschitz * distance
        curvature = self.outer_lipschitz + self.hessian_lipschitz * multiplier
        primal = (
            self.outer_cross_lipschitz * distance
            + self.cross_lipschitz * distance * multiplier
            + cross * curvature * distance / mu
        )
        usable = situation.adjoint.status != Status.NOT_RUN
        adjoint, primal = (jnp.where(usable, part, jnp.inf) for part in (adjoint, primal))
        return TruncationError(primal, adjoint, primal + adjoint, jnp.int32(1))
