"""The table of wrapped solvers: one more is one more row.

Each has the kind of problem that it solves, whether it unrolls, and whether it is among the few
that are tried by default; the others are tried with the slow tests.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import lineax
import numpy as np
import optax
import optimistix
import pytest
import scipy.sparse.linalg as spla
from sklearn.linear_model import Ridge

import bilevel as bl
import bilevel_pde as pde
import bilevel_solvers as bs
from bilevel_solvers.library import load

jaxopt = load("jaxopt")
projection = load("jaxopt.projection")

THETA, X0 = jnp.array([0.3, -0.2, 0.5]), jnp.zeros(3)
DRAW = np.random.default_rng(0)
FEATURES = DRAW.normal(size=(20, 3))
TARGETS = FEATURES @ np.array([1.0, -2.0, 0.5]) + 0.1 * DRAW.normal(size=20)


def convex(x: Any, theta: Any) -> Any:
    """A convex objective that is not quadratic."""
    return (
        jnp.sum(0.05 * x**4 + 0.5 * (1 + theta**2) * x**2 - theta * x)
        + jnp.sum(jnp.diff(x) ** 2) / 8
    )


def to_simplex(z: Any, step: Any, theta: Any) -> Any:
    """The proximal operator of the constraint that x is a distribution."""
    del step, theta
    return projection.projection_simplex(z)


def ridge_objective(w: Any, theta: Any) -> Any:
    """What scikit-learn's Ridge minimises, halved."""
    return 0.5 * jnp.sum((FEATURES @ w - TARGETS) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)


def tridiagonal(theta: Any) -> Any:
    """A matrix, symmetric positive definite."""
    neighbours = jnp.eye(3, k=1) + jnp.eye(3, k=-1)
    return (jnp.diag(1.0 + 0.1 * theta) + 0.2 * neighbours).astype(theta.dtype)


def circulant(theta: Any) -> Any:
    """The same kind as a function, whose entries nobody lists."""
    return lambda v: (1 + 0.1 * theta) * v + 0.2 * (jnp.roll(v, 1) + jnp.roll(v, -1))


GRID = pde.Grid((9,), 1.0, pde.Dirichlet(), "vertex")
DEFINITE: dict[str, Any] = {"symmetric": True, "positive_definite": True}

PROBLEMS: dict[str, tuple[Any, Any, Any]] = {
    "minimum": (bl.Minimization(convex), THETA, X0),
    # Polyak's step takes the minimum for zero.
    "interpolation": (
        bl.Minimization(lambda x, t: 0.5 * jnp.sum((x - t) ** 2 * (1 + jnp.arange(3)))),
        THETA,
        X0,
    ),
    "sparse": (bl.CompositeMinimization(convex, bl.L1(0.1)), THETA, X0),
    # No iterate comes to lie on a bound exactly, where differences see half a derivative.
    "box": (bl.CompositeMinimization(convex, bl.Box(-0.12, 0.2)), THETA, X0),
    "simplex": (bl.CompositeMinimization(convex, to_simplex), THETA, X0),
    "map": (bl.FixedPoint(lambda x, t: 0.3 * jnp.cos(jnp.roll(x, 1)) + t), THETA, X0),
    "root": (
        bl.RootFinding(lambda x, t: x + 0.1 * x**3 + 0.2 * jnp.roll(x, 1) - t),
        THETA,
        X0,
    ),
    "one root": (bl.RootFinding(lambda x, t: x**3 + x - t), jnp.array(2.0), jnp.array(0.0)),
    "matrix": (bl.LinearSystem(tridiagonal, lambda t: 1.0 + t, **DEFINITE), THETA, X0),
    "function": (bl.LinearSystem(circulant, lambda t: 1.0 + t, **DEFINITE), THETA, X0),
    "sparse matrix": (
        bl.LinearSystem(
            lambda t: -pde.laplacian(GRID) + t**2 * pde.identity(GRID),
            lambda t: t * jnp.ones(GRID.shape),
            **DEFINITE,
        ),
        jnp.array(2.0),
        jnp.zeros(GRID.shape),
    ),
    "ridge": (bl.Minimization(ridge_objective), jnp.array(0.3), X0),
}


def newton(problem: Any, x: Any, iterations: int, rtol: float) -> Any:
    """Newton's method as somebody might have written it in NumPy."""
    del rtol
    for count in range(iterations):
        residual = problem.residual(x)
        if np.linalg.norm(residual) <= problem.tolerance:
            return x, count
        jacobian = np.stack([problem.product(x, unit) for unit in np.eye(3)], axis=1)
        x = x - np.linalg.solve(jacobian, residual)
    return x


def penalty(theta: Any) -> dict[str, float]:
    """Ridge's parameter."""
    return {"alpha": float(np.exp(theta))}


def coefficients(fitted: Any, theta: Any) -> Any:
    """What of a fit is x."""
    del theta
    return fitted.coef_


def inverse_diagonal(matrix: Any) -> Any:
    """A preconditioner in SciPy."""
    inverse = 1.0 / matrix.diagonal()
    return spla.LinearOperator(matrix.shape, matvec=lambda v: inverse * np.ravel(v), dtype=float)


@dataclasses.dataclass(frozen=True)
class Row:
    """A wrapped solver, made when it is used."""

    name: str
    make: Callable[[], Any]
    kind: str
    unrolls: bool = True
    fast: bool = False
    budget: bl.Budget | None = None

    @functools.cached_property
    def solver(self) -> Any:
        """The solver itself; the same every time, as users should have it."""
        return self.make()


def of_jaxopt(name: str, kind: str, *, fast: bool = False, **settings: Any) -> Row:
    """A class of jaxopt with settings."""

    def make() -> Any:
        return bs.jaxopt(getattr(jaxopt, name), **settings)

    variant = "".join(f" {value}" for value in settings.values() if isinstance(value, str))
    unrolls = name not in {"LBFGSB", "Bisection"} and "hager-zhang" not in settings.values()
    return Row(f"jaxopt {name}{variant}", make, kind, unrolls, fast)


TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def of_optimistix(name: str, kind: str, *args: Any, fast: bool = False) -> Row:
    """A class of optimistix."""

    def make() -> Any:
        return bs.optimistix(getattr(optimistix, name)(*args, **TIGHT))

    # Line searches compare values of the objective, in which a smaller gradient drowns.
    budget = (
        bl.Budget(iterations=200, rtol=1e-6) if name in {"BFGS", "DFP", "NonlinearCG"} else None
    )
    return Row(f"optimistix {name}", make, kind, fast=fast, budget=budget)


def of_lineax(solver: Any, kind: str = "matrix", *, fast: bool = False) -> Row:
    """A linear solver of lineax."""
    iterative = isinstance(solver, lineax.CG | lineax.BiCGStab | lineax.GMRES | lineax.LSMR)
    iterative = iterative or isinstance(getattr(solver, "inner_solver", None), lineax.CG)
    name = f"lineax {type(solver).__name__} {type(getattr(solver, 'inner_solver', 0)).__name__}"
    # JAX has no derivative of the factors of QR.
    unrolls = not (iterative or isinstance(solver, lineax.QR))
    return Row(name.removesuffix(" int"), lambda: bs.lineax(solver), kind, unrolls, fast)


def of_scipy(maker: Any, method: str, kind: str, *, fast: bool = False, **options: Any) -> Row:
    """A method of SciPy."""
    name = f"{maker.__name__} {method} {kind}{' preconditioned' if options else ''}"
    return Row(name, lambda: maker(method, **options), kind, method == "splu", fast)


FIXED_STEP = {"stepsize": 0.5, "acceleration": False}
MIRROR = {
    "projection_grad": jaxopt.MirrorDescent.make_projection_grad(
        projection.projection_simplex, lambda x: x
    ),
    "stepsize": 0.5,
}

ROWS = [
    of_jaxopt("GradientDescent", "minimum", fast=True, **FIXED_STEP),
    of_jaxopt("LBFGS", "minimum"),
    of_jaxopt("LBFGS", "minimum", linesearch="backtracking"),
    of_jaxopt("LBFGS", "minimum", linesearch="hager-zhang"),
    of_jaxopt("BFGS", "minimum", linesearch="backtracking"),
    of_jaxopt("NonlinearCG", "minimum", linesearch="backtracking"),
    of_jaxopt("PolyakSGD", "interpolation", max_stepsize=0.3),
    of_jaxopt("ArmijoSGD", "minimum"),
    of_jaxopt("OptaxSolver", "minimum", opt=optax.sgd(0.5)),
    of_jaxopt("ProximalGradient", "sparse", **FIXED_STEP),
    of_jaxopt("ProjectedGradient", "box", **FIXED_STEP),
    of_jaxopt("LBFGSB", "box"),
    of_jaxopt("BlockCoordinateDescent", "sparse"),
    of_jaxopt("MirrorDescent", "simplex", **MIRROR),
    of_jaxopt("FixedPointIteration", "map"),
    of_jaxopt("AndersonAcceleration", "map", history_size=3),
    Row(
        "jaxopt AndersonWrapper",
        lambda: bs.jaxopt(
            jaxopt.AndersonWrapper,
            solver=jaxopt.FixedPointIteration(None),
            history_size=3,
            mixing_frequency=1,
        ),
        "map",
    ),
    of_jaxopt("Broyden", "root", history_size=8),
    of_jaxopt("GaussNewton", "root"),
    of_jaxopt("LevenbergMarquardt", "root"),
    of_jaxopt("Bisection", "one root", lower=-4.0, upper=4.0),
    of_optimistix("GradientDescent", "minimum", 0.5),
    of_optimistix("BFGS", "minimum"),
    of_optimistix("DFP", "minimum"),
    of_optimistix("NonlinearCG", "minimum"),
    of_optimistix("OptaxMinimiser", "minimum", optax.sgd(0.5)),
    of_optimistix("FixedPointIteration", "map"),
    of_optimistix("Newton", "root"),
    of_optimistix("Chord", "root"),
    of_optimistix("GaussNewton", "root"),
    of_optimistix("LevenbergMarquardt", "root"),
    of_optimistix("IndirectLevenbergMarquardt", "root"),
    of_optimistix("Dogleg", "root"),
    Row(
        "optimistix BestSoFarMinimiser",
        lambda: bs.optimistix(optimistix.BestSoFarMinimiser(optimistix.BFGS(**TIGHT))),
        "minimum",
        budget=bl.Budget(iterations=200, rtol=1e-6),
    ),
    of_lineax(lineax.CG(**TIGHT), fast=True),
    of_lineax(lineax.BiCGStab(**TIGHT)),
    of_lineax(lineax.GMRES(**TIGHT)),
    # Lineax 0.1 refuses single precision here; the grid's operator is double, and not tried in it.
    of_lineax(lineax.LSMR(**TIGHT), "sparse matrix"),
    of_lineax(lineax.Normal(lineax.CG(**TIGHT))),
    of_lineax(lineax.LU()),
    of_lineax(lineax.QR()),
    of_lineax(lineax.SVD()),
    of_lineax(lineax.Cholesky()),
    of_lineax(lineax.Normal(lineax.Cholesky())),
    of_lineax(lineax.AutoLinearSolver(well_posed=True)),
    Row("optax sgd", lambda: bs.optax(optax.sgd(0.5)), "minimum"),
    *(
        of_scipy(bs.scipy_minimize, method, "minimum", fast=method == "L-BFGS-B")
        for method in (
            *("BFGS", "CG", "L-BFGS-B", "TNC", "SLSQP", "Newton-CG"),
            *("dogleg", "trust-ncg", "trust-krylov", "trust-exact"),
        )
    ),
    *(
        of_scipy(bs.scipy_root, method, "root")
        for method in (
            *("hybr", "lm", "broyden1", "broyden2", "anderson", "linearmixing"),
            *("diagbroyden", "excitingmixing", "krylov", "df-sane"),
        )
    ),
    *(
        of_scipy(bs.scipy_sparse, method, "matrix", fast=method == "splu")
        for method in (
            *("cg", "minres", "bicgstab", "cgs", "gmres", "lgmres", "gcrotmk", "qmr", "tfqmr"),
            *("bicg", "splu"),
        )
    ),
    *(of_scipy(bs.scipy_sparse, method, "function") for method in ("cg", "gmres", "splu")),
    of_scipy(bs.scipy_sparse, "cg", "sparse matrix", preconditioner=inverse_diagonal),
    of_scipy(bs.scipy_sparse, "splu", "sparse matrix"),
    Row("pyamg", bs.pyamg, "sparse matrix", unrolls=False),
    Row("pyamg rs", lambda: bs.pyamg("ruge_stuben_solver"), "sparse matrix", unrolls=False),
    Row("pyamg cg", lambda: bs.pyamg(accel="cg"), "matrix", unrolls=False),
    Row("host", lambda: bs.host(newton), "root", unrolls=False, fast=True),
    Row(
        "sklearn Ridge",
        lambda: bs.sklearn(
            Ridge(fit_intercept=False),
            FEATURES,
            TARGETS,
            parameters=penalty,
            solution=coefficients,
        ),
        "ridge",
        unrolls=False,
    ),
]


def rows(condition: Callable[[Row], bool] = lambda row: True) -> list[Any]:
    """The rows that a test is about, most of them marked slow."""
    return [
        pytest.param(row, id=row.name, marks=[] if row.fast else [pytest.mark.slow])
        for row in ROWS
        if condition(row)
    ]
