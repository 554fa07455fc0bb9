"""The numerical matrix: systems good and bad, and every solver and estimator.

All systems have one size and go in as θ = (A, b), so that a solver compiles once for a dtype and
a transform, whatever the number of systems.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

N = 8
CAP = 300
DTYPES = ("float32", "float64")
RTOL = {"float32": 1e-5, "float64": 1e-11}


@dataclasses.dataclass(frozen=True)
class System:
    """A x = b, and what is known of it.

    - `failing`: its data are not finite, so that every solve has to fail.
    - `solvable`: whether there is a solution at all, as far as a dtype can tell.
    - `condition`: of A; infinite where it is singular.
    """

    name: str
    matrix: np.ndarray
    rhs: np.ndarray
    failing: bool = False
    solvable: bool = True
    condition: float = 10.0


def _rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((N, N)))[0]


def _symmetric(values: Any) -> np.ndarray:
    rotation = _rotation(0)
    matrix = rotation @ np.diag(values) @ rotation.T
    return (matrix + matrix.T) / 2


def _with(array: np.ndarray, place: Any, value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


@functools.cache
def systems() -> tuple[System, ...]:
    """All of them, of norm one where they have one."""
    good = _symmetric(np.linspace(0.1, 1.0, N))
    rhs = np.random.default_rng(1).standard_normal(N)
    zero, corner = np.zeros((N, N)), (2, 2)
    singular = _symmetric(np.linspace(0.0, 1.0, N))
    kernel = _rotation(0)[:, 0]
    across = rhs - kernel * (kernel @ rhs)
    skewed = good + 0.3 * np.triu(np.random.default_rng(2).standard_normal((N, N)), 1)
    found = [
        System("good", good, rhs),
        System("NaN in A", _with(good, corner, np.nan), rhs, failing=True),
        System("NaN in b", good, _with(rhs, 3, np.nan), failing=True),
        System("infinity in A", _with(good, corner, np.inf), rhs, failing=True),
        System("infinity in b", good, _with(rhs, 3, np.inf), failing=True),
        System("zero b", good, 0 * rhs),
        System("zero A", zero, rhs, solvable=False, condition=np.inf),
        System("zero A and b", zero, 0 * rhs, condition=np.inf),
        System("singular, consistent", singular, singular @ across, condition=np.inf),
        System("singular, inconsistent", singular, across + kernel, False, False, np.inf),
        System("indefinite", _symmetric(np.linspace(0.1, 1.0, N) * (-1.0) ** np.arange(N)), rhs),
        System("non-symmetric", skewed, rhs, condition=float(np.linalg.cond(skewed))),
    ]
    for power in range(4, 17, 2):
        spread = _symmetric(np.geomspace(1.0, 10.0**-power, N))
        found.append(System(f"condition 1e{power}", spread, rhs, condition=10.0**power))
    return tuple(found)


def stacked(dtype: str) -> tuple[jax.Array, jax.Array]:
    """The data of all systems, systems along the leading axis."""
    matrices, sides = ([getattr(one, part) for one in systems()] for part in ("matrix", "rhs"))
    return jnp.asarray(np.stack(matrices), dtype), jnp.asarray(np.stack(sides), dtype)


def data(system: System, dtype: str) -> tuple[jax.Array, jax.Array]:
    """θ of one system."""
    return jnp.asarray(system.matrix, dtype), jnp.asarray(system.rhs, dtype)


# ------------------------------------------------------------------- problems with that solution


def quadratic(x: Any, theta: Any) -> Any:
    matrix, rhs = theta
    return 0.5 * x @ (matrix @ x) - rhs @ x


PROBLEMS: dict[str, Callable[[], Any]] = {
    "linear": lambda: bl.LinearSystem(lambda theta: theta[0], lambda theta: theta[1]),
    "minimum": lambda: bl.Minimization(quadratic),
    "root": lambda: bl.RootFinding(lambda x, theta: theta[0] @ x - theta[1]),
    "map": lambda: bl.FixedPoint(lambda x, theta: x - 0.9 * (theta[0] @ x - theta[1])),
    "composite": lambda: bl.CompositeMinimization(quadratic, bl.L1(lambda _: 1e-3)),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A solver on a kind of problem, under an estimator."""

    name: str
    kind: str
    make: Callable[[], Any]
    estimator: Callable[[], Any] = lambda: None

    @functools.cached_property
    def problem(self) -> Any:
        return PROBLEMS[self.kind]()

    def options(self, dtype: str, iterations: int = CAP) -> dict[str, Any]:
        """What `bl.solve` is told."""
        budget = bl.Budget(iterations, rtol=RTOL[dtype])
        return {
            "solver": self.make(),
            "estimator": self.estimator(),
            "budget": budget,
            "adjoint_budget": budget,
        }


# Made once: what a transformation is made of is part of the compiled program.
_SGD = optax.sgd(0.9)

LINEAR: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "Richardson": lambda: bl.Richardson(0.9),
    "Jacobi": bl.Jacobi,
    "Chebyshev": lambda: bl.Chebyshev(0.1, 1.0),
    "SteepestDescent": bl.SteepestDescent,
    "ConjugateGradient": bl.ConjugateGradient,
    "preconditioned ConjugateGradient": lambda: bl.ConjugateGradient(
        preconditioner=bl.JacobiPreconditioner()
    ),
    "MINRES": bl.MINRES,
    "BiCGStab": bl.BiCGStab,
    "GMRES": bl.GMRES,
    "GMRES(3)": lambda: bl.GMRES(restart=3),
    "Direct": bl.Direct,
    "NystromInverse": lambda: bl.NystromInverse(N),
}

OTHERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "minimum, default": ("minimum", lambda: None),
    "root, default": ("root", lambda: None),
    "map, default": ("map", lambda: None),
    "GradientDescent": ("minimum", lambda: bl.GradientDescent(0.9)),
    "HeavyBall": ("minimum", lambda: bl.HeavyBall(0.9, 0.5)),
    "Nesterov": ("minimum", lambda: bl.Nesterov(0.9)),
    "ArmijoGradientDescent": ("minimum", bl.ArmijoGradientDescent),
    "LBFGS": ("minimum", bl.LBFGS),
    "Optax": ("minimum", lambda: bl.Optax(_SGD)),
    "Newton": ("root", bl.Newton),
    "Newton with GMRES": ("root", lambda: bl.Newton(linear=bl.GMRES())),
    "FixedPointIteration": ("map", bl.FixedPointIteration),
    "Anderson": ("map", bl.Anderson),
    "ProximalGradient": ("composite", lambda: bl.ProximalGradient(0.9)),
}

SOLVERS = (
    *(Subject(name, "linear", make) for name, make in LINEAR.items()),
    *(Subject(name, kind, make) for name, (kind, make) in OTHERS.items()),
)

_ESTIMATED: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {
    "Unrolled, Richardson": ("linear", LINEAR["Richardson"], bl.Unrolled),
    "Unrolled, GradientDescent": (
        "minimum",
        lambda: bl.GradientDescent(0.9),
        bl.Unrolled,
    ),
    "Unrolled, FixedPointIteration": ("map", bl.FixedPointIteration, bl.Unrolled),
    "Unrolled, Newton": ("root", bl.Newton, bl.Unrolled),
    "Unrolled(last=5)": ("map", bl.FixedPointIteration, lambda: bl.Unrolled(last=5)),
    "Neumann, Richardson": ("linear", LINEAR["Richardson"], bl.Neumann),
    "Neumann, FixedPointIteration": ("map", bl.FixedPointIteration, bl.Neumann),
    "OneStep, FixedPointIteration": ("map", bl.FixedPointIteration, bl.OneStep),
    "OneStep, Newton": ("root", bl.Newton, bl.OneStep),
    "Nystrom, ConjugateGradient": ("linear", bl.ConjugateGradient, lambda: bl.Nystrom(N)),
    "Nystrom, minimum": ("minimum", bl.LBFGS, lambda: bl.Nystrom(N)),
}

GRADIENTS = (
    *(
        dataclasses.replace(subject, estimator=lambda make=subject.make: bl.Implicit(make()))
        for subject in SOLVERS
        if subject.kind == "linear" and subject.name != "default"
    ),
    *(subject for subject in SOLVERS if subject.kind != "linear" or subject.name == "default"),
    *(Subject(name, *rest) for name, rest in _ESTIMATED.items()),
)


def by_name(value: Any) -> str:
    """How tests name a subject."""
    return str(getattr(value, "name", value))
