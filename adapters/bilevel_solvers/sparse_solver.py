"""SciPy's solvers of sparse linear systems: Krylov methods and direct ones, on the host."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg
from jaxtyping import Array, PyTree

from bilevel.bound import BoundProblem
from bilevel.signature import check_callable
from bilevel.solver.dense import coordinates
from bilevel.solver.direct import Direct
from bilevel_solvers.assembled import Assembled, has_entries
from bilevel_solvers.black_box import BlackBox, Run
from bilevel_solvers.choice import frozen, thawed, tried
from bilevel_solvers.foreign import ForeignSolver
from bilevel_solvers.host_code import FlatProblem, HostRun, call_host

SYMMETRIC = ("cg", "minres")
KRYLOV = ("cg", "bicgstab", "cgs", "gmres", "lgmres", "gcrotmk", "minres", "qmr", "tfqmr", "bicg")
WITH_TRANSPOSE = ("bicg", "qmr")
BY_CYCLES = ("lgmres", "gcrotmk")
DIRECT = ("spsolve", "splu")


class ScipyKrylov(BlackBox):
    """A Krylov method of SciPy; made by [`scipy_sparse`][].

    - `approximate`: matrix -> a preconditioner. It is made on the host and no function of
        vectors, which is what the core calls by that name.
    """

    linear_adjoint: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    method: str = eqx.field(static=True)
    approximate: Callable[[Any], Any] | None = eqx.field(static=True, default=None)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A linear system; for some a symmetric one."""
        return frozenset({"operator", "symmetric"} if self.method in SYMMETRIC else {"operator"})

    @property
    def title(self) -> str:
        """The method's name."""
        return f"scipy_sparse({self.method!r})"

    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """A call of the method."""
        operator = problem.operator
        assert operator is not None
        flat = FlatProblem(problem, asked.start)
        needed = self.approximate is not None or self.method in WITH_TRANSPOSE
        if needed or has_entries(operator):
            matrix = Assembled(self.title, operator, asked.start)
            return call_host(
                self._assembled,
                problem,
                flat,
                asked,
                [flat.residual],
                matrix.arrays,
                with_arrays=lambda arrays: {"matrix": lambda: matrix.csr(arrays)},
            )
        return call_host(self._matrix_free, problem, flat, asked, [flat.residual, flat.product])

    def _assembled(self, run: HostRun) -> tuple[Any, int]:
        matrix = run.functions["matrix"]()
        rhs = -run.functions["residual"](np.zeros_like(run.start))
        preconditioner = None if self.approximate is None else self.approximate(matrix)
        return self._solve(run, matrix, rhs, preconditioner)

    def _matrix_free(self, run: HostRun) -> tuple[Any, int]:
        # F = A x - b for whoever is linear, so that its value at zero is the right-hand side.
        rhs = -run.functions["residual"](np.zeros_like(run.start))
        product, size = run.functions["product"], run.start.size
        operator: Any = scipy.sparse.linalg.LinearOperator
        matvec = operator(
            (size, size), matvec=lambda v: product(run.start, np.ravel(v)), dtype=float
        )
        return self._solve(run, matvec, rhs, None)

    def _solve(self, run: HostRun, matrix: Any, rhs: Any, preconditioner: Any) -> tuple[Any, int]:
        method: Any = getattr(scipy.sparse.linalg, self.method)
        options = thawed(self.options)
        if preconditioner is not None:
            options["M"] = preconditioner
        if self.method == "gmres":
            return _by_cycles_of_gmres(run, matrix, rhs, options)
        size = float(np.linalg.norm(rhs))
        options |= {"rtol": 0.0, "atol": run.tolerance}
        if self.method == "minres":
            del options["atol"]
            options["rtol"] = run.tolerance / size if size > 0 else 0.0

        def progress(x: Any) -> None:
            # The residual norm is the method's own affair, as it costs a product.
            run.progress(x, np.inf)

        x, _ = method(
            matrix, rhs, x0=run.start, maxiter=run.iterations, callback=progress, **options
        )
        return x, run.count


def _by_cycles_of_gmres(
    run: HostRun, matrix: Any, rhs: Any, options: dict[str, Any]
) -> tuple[Any, int]:
    """GMRES cycle by cycle, for its cap is on cycles and the budget on iterations."""
    restart = int(options.pop("restart", 20))
    x, count, size = run.start, [0], float(np.linalg.norm(rhs))

    def progress(_: Any) -> None:
        count[0] += 1

    while count[0] < run.iterations:
        before, room = count[0], run.iterations - count[0]
        x, info = scipy.sparse.linalg.gmres(
            matrix,
            rhs,
            x0=x,
            rtol=0.0,
            atol=run.tolerance,
            restart=min(restart, room, rhs.size),
            maxiter=1,
            callback=progress,
            callback_type="pr_norm",
            **options,
        )
        if info == 0 or count[0] == before or not np.isfinite(x).all() or size == 0:
            break
    return x, min(count[0], run.iterations)


class ScipyDirect(ForeignSolver, Direct):
    """A direct solver of SciPy; made by [`scipy_sparse`][].

    As with `bl.Direct`, an iteration solves and adds the correction.
    """

    on_host: ClassVar[bool] = True
    method: str = eqx.field(static=True, default="splu")
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())

    @property
    def title(self) -> str:
        """The method's name."""
        return f"scipy_sparse({self.method!r})"

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Bring the matrix to where it is solved with."""
        assert problem.operator is not None
        matrix = Assembled(self.title, problem.operator, x, is_complex=True)
        flatten, unflatten = coordinates(x, real=problem.operator.matrix is None)

        matvec = problem.operator.matvec

        def solve(arrays: Any, b: Any, *, transposed: bool) -> np.ndarray:
            b = np.asarray(b)
            csr = matrix.csr(jax.tree.map(np.asarray, arrays))
            if not (np.isfinite(csr.data).all() and np.isfinite(b).all()):
                return np.full(b.shape, np.nan, b.dtype)
            return self._solved(csr.T if transposed else csr, b).astype(b.dtype)

        def called(v: PyTree, *, transposed: bool) -> PyTree:
            flat: Array = flatten(v)
            solved = jax.pure_callback(
                functools.partial(solve, transposed=transposed),
                jax.ShapeDtypeStruct(flat.shape, flat.dtype),
                matrix.arrays,
                flat,
                vmap_method="sequential",
            )
            return unflatten(solved)

        def precondition(v: PyTree) -> PyTree:
            return jax.lax.custom_linear_solve(
                matvec,
                v,
                solve=lambda _, b: called(b, transposed=False),
                transpose_solve=lambda _, b: called(b, transposed=True),
            )

        return dataclasses.replace(problem, precondition=precondition)

    def _solved(self, csr: Any, b: np.ndarray) -> np.ndarray:
        try:
            # SuperLU says "exactly singular" by an error; spsolve would warn, and return NaN.
            factors = scipy.sparse.linalg.splu(sp.csc_array(csr), **thawed(self.options))
        except RuntimeError:
            return np.full(b.shape, np.nan)
        return factors.solve(b)


def scipy_sparse(
    method: str = "cg", *, preconditioner: Callable[[Any], Any] | None = None, **options: Any
) -> ScipyKrylov | ScipyDirect:
    """A solver of `scipy.sparse.linalg` as an inner solver, for a linear system or its adjoint.

    - Krylov methods are black boxes on the host: a run to the cap and the residual norm of the
        budget, both traced, the cap kept exactly.  They do not unroll.  An iteration is SciPy's
        own, of "gmres" one inside a cycle, of "lgmres" and "gcrotmk" a whole cycle.
    - "splu" (which "spsolve" is another name for) factorises on the host; an iteration solves and
        adds the correction, so that a second one is a step of refinement.

    The matrix is that of `bl.LinearSystem`: dense, or of `bilevel_pde` (`from_scipy` makes one of
    a SciPy matrix).  Where there is only a function, as in the adjoint of a minimisation, Krylov
    methods apply it, compiled, and whoever needs entries gets them column by column.  Real matrices
    only, in SciPy's double precision; under jit and vmap, one sample after another.

    **Arguments:**

    - `method`: "cg", "minres" (both symmetric), "bicgstab", "cgs", "gmres", "lgmres", "gcrotmk",
        "qmr", "tfqmr", "bicg"; "splu", "spsolve".
    - `preconditioner`: matrix -> M⁻¹, of a `scipy.sparse.csr_array` a SciPy `LinearOperator`, for
        a Krylov method.
    - `options`: of the method, such as `restart=30`, hashable; without `rtol`, `atol` and
        `maxiter`, which the budget is.

    **Raises:** `ValueError` for another method, or an option that the budget is.

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_solvers
    >>> problem = bl.LinearSystem(jnp.diag(jnp.array([1.0, 2.0])), jnp.ones(2))
    >>> solver = bilevel_solvers.scipy_sparse("cg")
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=solver)
    >>> [round(float(v), 4) for v in solution.value], int(solution.iterations)
    ([1.0, 0.5], 2)
    """
    if method not in (*KRYLOV, *DIRECT):
        msg = (
            f"scipy_sparse: method must be one of {', '.join((*KRYLOV, *DIRECT))}, got {method!r}."
        )
        raise ValueError(msg)
    kept = frozen("scipy_sparse", options, taken=("maxiter", "rtol", "atol", "tol"))
    run: Any = getattr(scipy.sparse.linalg, method)
    small = sp.csc_array(np.eye(2))
    if method == "spsolve":
        run = scipy.sparse.linalg.splu
    right = (np.ones(2),) if method in KRYLOV else ()
    tried("scipy_sparse", options, lambda: run(small, *right, **options))
    if method in KRYLOV:
        if preconditioner is not None:
            check_callable("scipy_sparse", "preconditioner", preconditioner, ("matrix",))
        return ScipyKrylov(method=method, approximate=preconditioner, options=kept)
    if preconditioner is not None:
        msg = f"scipy_sparse: {method!r} is direct and takes no preconditioner. Leave it out."
        raise ValueError(msg)
    return ScipyDirect(method="splu", options=kept)
