"""The conformance table: problem × solver × estimator × library; one more is one more row.

Every problem is written once, over an array namespace, with its derivatives by hand; how much of
that a library is given depends on what it can do itself.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import array_api_compat
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import bilevel as bl
import bilevel_arrays as ba

SIZE = 4
THETA = np.array([0.3, -0.2, 0.5, 0.1])
START = np.array([0.1, 0.0, -0.1, 0.2])
NEIGHBOURS = np.eye(SIZE, k=1) + np.eye(SIZE, k=-1)
LAPLACIAN = 2 * np.eye(SIZE) - NEIGHBOURS
SKEW = 0.3 * np.eye(SIZE, k=1) - 0.1 * np.eye(SIZE, k=-1)


@dataclasses.dataclass(frozen=True)
class Library:
    """An array library.

    - `namespace`: its own. `put`: NumPy's numbers as its arrays. `get`: the way back.
    - `sparse`: a dense matrix of NumPy as its sparse one, or as a pair of products.
    - `autograd`: whether it finds derivatives itself.
    """

    name: str
    namespace: Any
    put: Callable[[Any], Any]
    get: Callable[[Any], np.ndarray]
    sparse: Callable[[Any], Any]
    autograd: bool = False


def _jax() -> Library:
    return Library("jax", jnp, jnp.asarray, np.asarray, jnp.asarray)


def _numpy() -> Library:
    return Library("numpy", np, np.array, np.asarray, scipy.sparse.csr_array)


def _strict() -> Library:
    xp = importlib.import_module("array_api_strict")

    def pair(matrix: Any) -> Any:
        dense = xp.asarray(matrix)
        return lambda v: dense @ v, lambda v: xp.matrix_transpose(dense) @ v

    return Library("array_api_strict", xp, xp.asarray, np.from_dlpack, pair)


def _torch(*, user: bool = False, rows: bool = False) -> Library:
    torch = importlib.import_module("torch")

    def sparse(matrix: Any) -> Any:
        dense = torch.tensor(matrix)
        return dense.to_sparse_csr() if rows else dense.to_sparse()

    return Library(
        "torch",
        array_api_compat.array_namespace(torch.zeros(1)),
        lambda values: torch.tensor(np.asarray(values)),
        lambda tensor: tensor.detach().numpy(),
        sparse,
        autograd=not user,
    )


def _cupy() -> Library:
    cupy = importlib.import_module("cupy")
    sparse = importlib.import_module("cupyx.scipy.sparse")
    return Library(
        "cupy",
        cupy,
        cupy.asarray,
        cupy.asnumpy,
        lambda matrix: sparse.csr_matrix(cupy.asarray(matrix)),
    )


LIBRARIES: dict[str, Callable[[], Library]] = {
    "jax": _jax,
    "numpy": _numpy,
    "torch": _torch,
    "torch, derivatives by hand": functools.partial(_torch, user=True),
    "torch, compressed rows": functools.partial(_torch, rows=True),
    "array_api_strict": _strict,
    "cupy": _cupy,
}
"""Made when they are used: not all of them are installed everywhere."""


@dataclasses.dataclass(frozen=True)
class Formulas:
    """A problem over a namespace.

    - `kind`: its class, by name. `main`: objective, function, mapping, or (operator, rhs).
    - `gradient`: of a minimisation. `vjp`: the products by hand.
    - `options`: what is declared.
    """

    kind: str
    main: Any
    vjp: Any
    gradient: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def made(self, library: Library) -> Any:
        """The problem, with what the library needs."""
        if library.name == "jax":
            arguments = self.main if isinstance(self.main, tuple) else (self.main,)
            return getattr(bl, self.kind)(*arguments, **self.options)
        kind, options = getattr(ba, self.kind), dict(self.options)
        if not library.autograd:
            options["vjp"] = self.vjp
        if self.kind == "Minimization" and not library.autograd:
            return kind(gradient=self.gradient, **options)
        arguments = self.main if isinstance(self.main, tuple) else (self.main,)
        return kind(*arguments, **options)


def _minimum(library: Library) -> Formulas:
    xp, coupling = library.namespace, library.put(LAPLACIAN / 4)

    def objective(x: Any, t: Any) -> Any:
        own = 0.05 * x**4 + 0.5 * (1 + t**2) * x**2 - t * x
        return xp.sum(own) + 0.5 * xp.sum(x * (coupling @ x))

    def vjp(x: Any, t: Any, v: Any) -> Any:
        return (0.6 * x**2 + 1 + t**2) * v + coupling @ v, (2 * t * x - 1) * v

    return Formulas(
        "Minimization",
        objective,
        vjp,
        gradient=lambda x, t: 0.2 * x**3 + (1 + t**2) * x - t + coupling @ x,
    )


def _map(library: Library) -> Formulas:
    xp, mixing = library.namespace, library.put(NEIGHBOURS + SKEW)
    back = library.put((NEIGHBOURS + SKEW).T)
    return Formulas(
        "FixedPoint",
        lambda x, t: 0.3 * xp.cos(mixing @ x) + t,
        lambda x, t, v: (-0.3 * (back @ (xp.sin(mixing @ x) * v)), v),
    )


def _root(library: Library) -> Formulas:
    mixing, back = library.put(SKEW), library.put(SKEW.T)
    return Formulas(
        "RootFinding",
        lambda x, t: x + 0.1 * x**3 + mixing @ x - t,
        lambda x, t, v: ((1 + 0.3 * x**2) * v + back @ v, -1.0 * v),
    )


def _matrix(library: Library, around: np.ndarray, **options: Any) -> Formulas:
    rest, unit = library.put(around), library.put(np.eye(SIZE))
    return Formulas(
        "LinearSystem",
        (lambda t: unit * (2 + t**2) + rest, lambda t: 1 + t),
        lambda x, t, v: (1 - 2 * t * x) * v,
        options=options,
    )


def _constant(library: Library) -> Formulas:
    operator = library.sparse(2 * np.eye(SIZE) + SKEW)
    return Formulas("LinearSystem", (operator, lambda t: 1 + t), lambda x, t, v: v)


def _sparse(library: Library) -> Formulas:
    """Symmetric, which nobody says: a matrix is looked at, a pair of products is tried."""
    operator = library.sparse(LAPLACIAN)
    options = {"positive_definite": True} if library.name != "jax" else {}
    return Formulas("LinearSystem", (operator, lambda t: 1 + t), lambda x, t, v: v, options=options)


PROBLEMS: dict[str, Callable[[Library], Formulas]] = {
    "minimum": _minimum,
    "map": _map,
    "root": _root,
    "definite": functools.partial(
        _matrix, around=0.2 * NEIGHBOURS, symmetric=True, positive_definite=True
    ),
    "general": functools.partial(_matrix, around=SKEW),
    "constant, sparse": _constant,
    "definite, sparse": _sparse,
}

CG, GMRES, BICGSTAB = bl.ConjugateGradient(), bl.GMRES(), bl.BiCGStab()
SCALED = bl.ConjugateGradient(preconditioner=bl.JacobiPreconditioner())

ROWS: list[tuple[str, bl.InnerSolver, bl.Estimator]] = [
    ("minimum", bl.GradientDescent(step_size=0.5), bl.Implicit(CG)),
    ("minimum", bl.GradientDescent(step_size=0.5), bl.Implicit(GMRES)),
    ("minimum", bl.GradientDescent(step_size=0.4), bl.Neumann()),
    ("map", bl.FixedPointIteration(), bl.Neumann()),
    ("map", bl.FixedPointIteration(damping=0.2), bl.Implicit(BICGSTAB)),
    ("map", bl.Anderson(memory=2), bl.Implicit(bl.Anderson(memory=2))),
    ("map", bl.Anderson(), bl.Implicit(GMRES)),
    ("root", bl.Richardson(step_size=0.8), bl.Implicit(BICGSTAB)),
    ("root", bl.Richardson(step_size=0.8), bl.Neumann()),
    ("definite", CG, bl.Implicit(CG)),
    ("definite", SCALED, bl.Implicit(SCALED)),
    ("definite", bl.Jacobi(), bl.Implicit(bl.Jacobi(weight=0.9))),
    ("definite", bl.Anderson(memory=3, mixing=0.4), bl.Neumann(step_size=0.4)),
    ("general", BICGSTAB, bl.Implicit(BICGSTAB)),
    ("general", GMRES, bl.Implicit(GMRES)),
    ("general", bl.GMRES(restart=2), bl.Implicit(bl.GMRES(restart=3))),
    ("general", bl.Jacobi(), bl.Neumann(step_size=0.4)),
    ("constant, sparse", GMRES, bl.Implicit(BICGSTAB)),
    ("constant, sparse", BICGSTAB, bl.Implicit(GMRES)),
    ("definite, sparse", CG, bl.Implicit(CG)),
    ("definite, sparse", bl.Richardson(step_size=0.3), bl.Implicit(CG)),
]


def label(row: tuple[str, bl.InnerSolver, bl.Estimator]) -> str:
    """What a row is called."""
    problem, solver, estimator = row
    inside = getattr(estimator, "solver", None)
    parts = [problem, type(solver).__name__, type(estimator).__name__]
    return "-".join(parts + ([] if inside is None else [type(inside).__name__]))
