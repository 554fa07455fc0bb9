"""PyAMG: algebraic multigrid on the host, as a black box."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import numpy as np
import scipy.sparse
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.signature import brief
from bilevel_solvers.assembled import Assembled
from bilevel_solvers.black_box import BlackBox, Run
from bilevel_solvers.choice import frozen, thawed, tried
from bilevel_solvers.host_code import FlatProblem, HostRun, call_host
from bilevel_solvers.library import load

CYCLES = ("V", "W", "F", "AMLI")

BUILDERS = (
    "ruge_stuben_solver",
    "smoothed_aggregation_solver",
    "rootnode_solver",
    "pairwise_solver",
    "air_solver",
)


class PyAMG(BlackBox):
    """Cycles of PyAMG; made by [`pyamg`][]."""

    requires: ClassVar[frozenset[str]] = frozenset({"operator"})
    linear_adjoint: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    build: Any = eqx.field(static=True)
    cycle: str = eqx.field(static=True, default="V")
    accel: str | None = eqx.field(static=True, default=None)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())

    @property
    def title(self) -> str:
        """What builds the hierarchy."""
        named = self.build if isinstance(self.build, str) else type(self.build).__name__
        return f"pyamg({named})"

    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """A hierarchy, and its cycles."""
        assert problem.operator is not None
        flat = FlatProblem(problem, asked.start)
        matrix = Assembled(self.title, problem.operator, asked.start)
        return call_host(
            self._cycles,
            problem,
            flat,
            asked,
            [flat.residual],
            matrix.arrays,
            with_arrays=lambda arrays: {"matrix": lambda: matrix.csr(arrays)},
        )

    def _cycles(self, run: HostRun) -> tuple[Any, int]:
        # The correction, from zero: its right-hand side is what is left at the start.
        left = -run.functions["residual"](run.start)
        size = float(np.linalg.norm(left))
        hierarchy = self._hierarchy(run.functions["matrix"])
        norms: list[float] = []
        correction = hierarchy.solve(
            left,
            tol=run.tolerance / size if size > 0 else 1.0,
            maxiter=run.iterations,
            cycle=self.cycle,
            accel=self.accel,
            residuals=norms,
        )
        return run.start + correction, min(max(len(norms) - 1, 0), run.iterations)

    def _hierarchy(self, matrix: Callable[[], Any]) -> Any:
        library = load("pyamg")
        if isinstance(self.build, library.MultilevelSolver):
            return self.build
        scipy_matrix: Any = load("scipy.sparse").csr_matrix(matrix())
        make: Any = getattr(library, self.build) if isinstance(self.build, str) else self.build
        return make(scipy_matrix, **thawed(self.options))


def pyamg(
    build: Any = "smoothed_aggregation_solver",
    *,
    cycle: str = "V",
    accel: str | None = None,
    **options: Any,
) -> PyAMG:
    """Algebraic multigrid of PyAMG as an inner solver, for a linear system or its adjoint.

    A black box on the host: the hierarchy is made of the matrix at hand, anew for every run, and
    cycled to the cap and the residual norm of the budget, both traced.  A cycle is an iteration.
    It does not unroll; `bilevel_pde.AlgebraicMultigrid` cycles in JAX.  The matrix is that of
    `bl.LinearSystem`, dense or of `bilevel_pde` (`from_scipy` makes one of a SciPy matrix).

    **Arguments:**

    - `build`: the name of one of PyAMG's builders, a function matrix -> hierarchy, or a
        hierarchy that was built before (a `pyamg.MultilevelSolver`): of a matrix near the problem's
        own it does as well, as the true residual is what it corrects.
    - `cycle`: "V", "W" or "F". `accel`: a Krylov method around the cycles, such as "cg".
    - `options`: of the builder, such as `max_levels=4`, hashable.

    **Raises:** `ValueError` for another name, `TypeError` for anything else.

    >>> import jax.numpy as jnp, scipy.sparse as sp, bilevel as bl
    >>> import bilevel_pde as pde, bilevel_solvers
    >>> line = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(100, 100))
    >>> problem = bl.LinearSystem(pde.from_scipy(line), jnp.ones(100))
    >>> solver = bilevel_solvers.pyamg("ruge_stuben_solver")
    >>> solution = bl.solve(
    ...     problem, None, jnp.zeros(100), solver=solver, budget=bl.Budget(rtol=1e-3)
    ... )
    >>> round(float(solution.value.max())), int(solution.iterations) < 10
    (1275, True)
    """
    library = load("pyamg")
    if isinstance(build, str) and build not in BUILDERS:
        msg = f"pyamg: build must be one of {', '.join(BUILDERS)}, got {build!r}."
        raise ValueError(msg)
    built = isinstance(build, library.MultilevelSolver)
    if not (isinstance(build, str) or built or callable(build)):
        msg = (
            "pyamg: build must be the name of a builder, a function of the matrix or a hierarchy, "
            f"got {brief(build)}."
        )
        raise TypeError(msg)
    if built and options:
        msg = f"pyamg: a hierarchy is built already; {', '.join(options)} go with a builder."
        raise ValueError(msg)
    if cycle not in CYCLES:
        msg = f"pyamg: cycle must be one of {', '.join(CYCLES)}, got {cycle!r}."
        raise ValueError(msg)
    if isinstance(accel, str) and not hasattr(library.krylov, accel):
        msg = f"pyamg: accel must be a method of pyamg.krylov, such as 'cg', got {accel!r}."
        raise ValueError(msg)
    make: Any = getattr(library, build) if isinstance(build, str) else build
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(4, 4))
    tried("pyamg", options, lambda: make(scipy.sparse.csr_matrix(line), **options))
    return PyAMG(build=build, cycle=cycle, accel=accel, options=frozen("pyamg", options))
