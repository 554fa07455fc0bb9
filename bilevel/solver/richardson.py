"""Richardson iteration."""

from typing import Any, ClassVar

from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.parameter import positive
from bilevel.solver.preconditioning import precondition, prepare_preconditioner


class Richardson(InnerSolver):
    """Richardson iteration, x ← x + α M⁻¹ r, for any residual.

    For a linear system it converges when all eigenvalues of I - α M⁻¹A lie within the unit
    circle; from zero, k steps sum the first k terms of the Neumann series of A⁻¹.

    **Arguments:**

    - `step_size`: α. Traced.
    - `preconditioner`: v -> M⁻¹v, or an object with `at(problem, x)`.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(2.0 * jnp.eye(2), jnp.ones(2))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.Richardson(step_size=0.5))
    >>> [float(v) for v in solution.value]
    [0.5, 0.5]
    """

    stationary: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True

    step_size: Float[Array, ""] | float
    preconditioner: Any = None

    def __check_init__(self) -> None:
        """Validate the step size where it is concrete."""
        positive("Richardson", "step_size", self.step_size)

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The iterate is all there is."""
        del problem
        return x

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """One step along the preconditioned residual."""
        return vector.add_scaled(state, self.step_size, precondition(problem, residual))

    def value(self, state: PyTree) -> Any:
        """The state itself."""
        return state
