"""Lineax's linear solvers: direct ones as factors, iterative ones as black boxes."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.operator import LinearOperator
from bilevel.signature import brief
from bilevel.solver.direct import Direct
from bilevel_solvers.black_box import BlackBox, Run
from bilevel_solvers.foreign import ForeignSolver
from bilevel_solvers.library import load, origin

ITERATIVE = ("CG", "BiCGStab", "GMRES", "LSMR")
"""Those that take a cap on their steps, and tolerances."""

DEFINITE = ("CG", "Cholesky")
"""Those that refuse what is not declared positive definite."""


STEPS_IN_X = 1e6
"""A step in x of so many times 1 + |x| is one that lineax may end with."""


class LineaxIterative(BlackBox):
    """An iterative linear solver of lineax; made by [`lineax`][]."""

    linear_adjoint: ClassVar[bool] = True

    solver: Any

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A linear system; a symmetric one for CG."""
        return _requires(self.solver)

    @property
    def title(self) -> str:
        """The name of its class."""
        return _title(self.solver)

    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """A run to the iterations and the residual norm asked for."""
        assert problem.operator is not None
        # Lineax asks the last step in x to be below `atol`, too, whatever the units of x: both
        # sides are multiplied by so much that this is so long before the residual is.
        size = STEPS_IN_X * (1.0 + vector.norm(asked.start))
        target = jnp.where(asked.tolerance > 0, asked.tolerance, 1.0)
        factor = vector.unit(size / target).astype(target.dtype)
        if not _is(self.solver, *ITERATIVE):
            factor = jnp.ones_like(target)  # in normal equations it would come twice
        operator = problem.operator
        scaled = LinearOperator(
            lambda v: vector.scale(factor, operator.matvec(v)),
            matrix=None if operator.matrix is None else factor * operator.matrix,
            symmetric=operator.symmetric,
            positive_definite=operator.positive_definite,
        )
        solution = load("lineax").linear_solve(
            _as_lineax(scaled, asked.start, definite=_is(self.solver, *DEFINITE)),
            vector.scale(factor, asked.residual),
            _with_budget(self.solver, factor * asked.tolerance, asked.iterations),
            throw=False,
        )
        return vector.add(asked.start, solution.value), solution.stats["num_steps"]


class LineaxDirect(ForeignSolver, Direct):
    """A direct linear solver of lineax; made by [`lineax`][].

    As with `bl.Direct`, an iteration solves with the factors and adds the correction.
    """

    solver: Any

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A linear system; a symmetric one for Cholesky."""
        return _requires(self.solver)

    @property
    def title(self) -> str:
        """The name of its class."""
        return _title(self.solver)

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Factorise."""
        assert problem.operator is not None
        library: Any = load("lineax")
        operator = _as_lineax(problem.operator, x, definite=_is(self.solver, *DEFINITE))
        factors = self.solver.init(operator, {})

        def precondition(v: PyTree) -> PyTree:
            solved = library.linear_solve(operator, v, self.solver, state=factors, throw=False)
            return solved.value

        return dataclasses.replace(problem, precondition=precondition)


def lineax(solver: Any) -> LineaxIterative | LineaxDirect:
    """A linear solver of lineax as an inner solver, for a linear system or its adjoint.

    - Iterative ones (`CG`, `BiCGStab`, `GMRES`, `LSMR`, `Normal` of one) have no single step to
        call, so they are black boxes: a run to the cap and the tolerance of the budget, traced, in
        place of `max_steps`, `rtol`, `atol` and `norm`.  Their steps are counted as iterations
        (a cycle of GMRES as one); they do not unroll.
    - Direct ones (`LU`, `QR`, `SVD`, `Cholesky`, `Diagonal`, `Triangular`, `Tridiagonal`,
        `AutoLinearSolver`, ...) factorise once; an iteration solves with the factors.  They
        unroll, but for `QR`, for whose factors JAX has no derivative and says so.

    `LSMR` of lineax 0.1 refuses single precision where JAX has double enabled.

    Lineax calls a solution successful that is NaN; here the true residual decides, and such an end
    is `NONFINITE`.

    **Arguments:**

    - `solver`: of lineax, with its settings.

    **Raises:** `TypeError` for anything else.

    >>> import lineax, jax.numpy as jnp, bilevel as bl, bilevel_solvers
    >>> problem = bl.LinearSystem(jnp.diag(jnp.array([1.0, 2.0])), jnp.ones(2))
    >>> solver = bilevel_solvers.lineax(lineax.CG(rtol=1e-6, atol=1e-6))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=solver)
    >>> [round(float(v), 4) for v in solution.value], int(solution.iterations)
    ([1.0, 0.5], 2)
    """
    base: Any = load("lineax").AbstractLinearSolver
    if not isinstance(solver, base):
        hint = ""
        if isinstance(solver, type) and origin(solver).startswith("lineax"):
            hint = f" Write lineax.{solver.__name__}(...)."
        msg = (
            "bilevel_solvers.lineax: solver must be a linear solver of lineax, such as "
            f"lineax.CG(rtol=1e-8, atol=1e-8), got {brief(solver)}.{hint}"
        )
        raise TypeError(msg)
    return LineaxIterative(solver) if _is_iterative(solver) else LineaxDirect(solver)


def _is(solver: Any, *names: str) -> bool:
    return any(base.__name__ in names for base in type(solver).__mro__)


def _is_iterative(solver: Any) -> bool:
    inner = getattr(solver, "inner_solver", None)
    return _is(solver, *ITERATIVE) or (inner is not None and _is_iterative(inner))


def _requires(solver: Any) -> frozenset[str]:
    return frozenset({"operator", "symmetric"} if _is(solver, *DEFINITE) else {"operator"})


def _title(solver: Any) -> str:
    return f"lineax.{type(solver).__name__}"


def _with_budget(solver: Any, tolerance: Array, iterations: Array) -> Any:
    """The solver with a cap and a tolerance of ours, traced."""
    if not _is(solver, *ITERATIVE):
        inner = _with_budget(solver.inner_solver, tolerance, iterations)
        return eqx.tree_at(lambda s: s.inner_solver, solver, inner)
    given: dict[str, Any] = {
        "rtol": jnp.zeros_like(tolerance),
        "atol": tolerance,
        "norm": vector.norm,
        "max_steps": iterations,
    }
    known = {field.name for field in dataclasses.fields(solver)}
    return dataclasses.replace(solver, **{name: given[name] for name in given if name in known})


def _as_lineax(operator: LinearOperator, like: PyTree, *, definite: bool) -> Any:
    library: Any = load("lineax")
    tags: list[Any] = []
    if operator.symmetric:
        tags.append(library.symmetric_tag)
    if operator.positive_definite or definite:
        # The true residual tells whether it is so.
        tags.append(library.positive_semidefinite_tag)
    whole = isinstance(like, jax.Array) and like.ndim == 1
    if operator.matrix is not None and whole:
        return library.MatrixLinearOperator(operator.matrix, tags)
    structure = jax.eval_shape(lambda: like)
    return library.FunctionLinearOperator(operator.matvec, structure, tags)
