"""Host code: what SciPy and its like see of a run, and how they are called from traced code."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from bilevel.bound import BoundProblem
from bilevel.solver.dense import coordinates
from bilevel_solvers.black_box import Run

FAILURES = (np.linalg.LinAlgError, FloatingPointError, ZeroDivisionError, OverflowError)
"""How libraries say that their numbers came to nothing: a status, and no error."""


class Enough(Exception):  # noqa: N818
    """Raised inside a library's callback once the caller has what was asked for."""


class HostRun:
    """A run as host code sees it, in flat real coordinates and in double precision.

    - `start`: shape (n,), float64. `iterations`: the most to do, at least 1.
    - `target`, `tolerance`: as in `Run`, floats.
    - `functions`: those of the problem by name, from arrays (n,) to NumPy arrays.
    - `epsilon`: the rounding error of what the functions return.
    - `theta`: the θ with NumPy leaves, where it was asked for.
    """

    def __init__(
        self,
        start: np.ndarray,
        numbers: tuple[Any, Any, Any],
        functions: dict[str, Callable[..., Any]],
        theta: Any,
    ):
        self.start = start
        self.iterations = int(numbers[0])
        self.target, self.tolerance = float(numbers[1]), float(numbers[2])
        self.functions = functions
        self.theta = theta
        self.epsilon = 0.0
        self.x = start
        self.count = 0

    def progress(self, x: Any, norm: float | None = None) -> None:
        """Note an iterate of the library.

        **Raises:** `Enough` at the cap, or where the residual norm is small enough; that is
        evaluated where it is not given.
        """
        self.x = np.array(x, float)
        self.count += 1
        if norm is None:
            norm = float(np.linalg.norm(self.functions["residual"](self.x)))
        if self.count >= self.iterations or norm <= self.target:
            raise Enough


Body = Callable[[HostRun], tuple[Any, int]]


def call_host(
    body: Body,
    problem: BoundProblem,
    flat: "FlatProblem",
    asked: Run,
    functions: Sequence[Callable[..., Any]],
    arrays: PyTree = None,
    *,
    with_arrays: Callable[[Any], dict[str, Callable[..., Any]]] | None = None,
    with_theta: bool = False,
    failures: tuple[type[Exception], ...] = FAILURES,
) -> tuple[PyTree, Array]:
    """Run host code by a callback, under jit and vmap (one sample after another).

    **Arguments:**

    - `body`: run -> (x of shape (n,), iterations), in NumPy.
    - `flat`: the problem in flat coordinates, at `asked.start`. `functions`: what of it the
        body may evaluate; compiled once, and what they captured is brought to the host, too.
    - `arrays`: what else is brought to the host; `with_arrays` makes functions of it there.
    - `with_theta`: whether it needs θ.
    - `failures`: what is raised where numbers come to nothing; all else is shown.

    **Returns:** x like `asked.start`, NaN where the host code failed, and the iterations.
    """
    start = flat.start
    taken = {function.__name__: _Taken(function, start) for function in functions}
    captured = {name: function.arrays for name, function in taken.items()}
    theta = problem.theta if with_theta else None
    double = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]

    def call(captured: Any, theta: Any, arrays: Any, start: Any, *numbers: Any) -> Any:
        start = np.asarray(start)
        # Threads of callbacks know nothing of the caller's precision.
        with jax.enable_x64(double), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what became of it, the status says
            bound: dict[str, Callable[..., Any]] = {
                name: function.bound(captured[name]) for name, function in taken.items()
            }
            if with_arrays is not None:
                bound |= with_arrays(jax.tree.map(np.asarray, arrays))
            theta = jax.tree.map(np.asarray, theta)
            run = HostRun(start.astype(float), numbers, bound, theta)
            run.epsilon = float(np.finfo(start.dtype).eps)
            try:
                x, count = body(run)
            except Enough:
                x, count = run.x, run.count
            except failures:
                x, count = np.full(start.shape, np.nan), run.count
        return np.asarray(x).astype(start.dtype), np.int32(count)

    shapes = (jax.ShapeDtypeStruct(start.shape, start.dtype), jax.ShapeDtypeStruct((), jnp.int32))
    x, count = jax.pure_callback(
        call,
        shapes,
        captured,
        theta,
        arrays,
        start,
        asked.iterations,
        asked.target,
        asked.tolerance,
        vmap_method="sequential",
    )
    return flat.unflatten(x), count


class _Taken:
    """A function of arrays (n,) in traced code, to be evaluated on the host."""

    def __init__(self, function: Callable[..., Any], start: Array):
        given = [start] * len(inspect.signature(function).parameters)
        closed = eqx.filter_closure_convert(function, *given)
        self.arrays, static = eqx.partition(closed, eqx.is_array)
        self._evaluate = jax.jit(lambda arrays, *given: eqx.combine(arrays, static)(*given))
        self._dtype = start.dtype

    def bound(self, arrays: Any) -> Callable[..., Any]:
        """The function of NumPy arrays."""

        def evaluate(*given: Any) -> Any:
            outcome = self._evaluate(arrays, *(np.asarray(v, self._dtype) for v in given))
            return jax.tree.map(lambda leaf: np.array(leaf, float), outcome)  # SciPy writes into it

        return evaluate


class FlatProblem:
    """A problem in flat real coordinates, F uphill: the gradient, or the user's own residual.

    - `start`: shape (n,). `unflatten`: the way back to what is like x.
    """

    def __init__(self, problem: BoundProblem, like: PyTree):
        self._problem = problem
        self.flatten, self.unflatten = coordinates(like, real=True)
        self.start: Array = self.flatten(like)

    def residual(self, x: Array) -> Array:
        """F, shape (n,)."""
        return -self.flatten(self._problem.residual(self.unflatten(x)))

    def objective(self, x: Array) -> Array:
        """What is minimised."""
        assert self._problem.objective is not None
        return self._problem.objective(self.unflatten(x))

    def value_and_gradient(self, x: Array) -> tuple[Array, Array]:
        """The objective and its gradient."""
        return self.objective(x), self.residual(x)

    def product(self, x: Array, v: Array) -> Array:
        """The Jacobian of F, or the Hessian, times a vector."""
        return jax.jvp(self.residual, (x,), (v,))[1]

    def jacobian(self, x: Array) -> Array:
        """The Jacobian of F, or the Hessian, shape (n, n)."""
        return jax.jacfwd(self.residual)(x)
