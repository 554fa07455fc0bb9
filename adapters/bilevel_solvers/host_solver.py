"""Anybody's host function as a black box."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.signature import check_callable
from bilevel_solvers.black_box import BlackBox, Run
from bilevel_solvers.host_code import FlatProblem, HostRun, call_host


class HostProblem:
    """An inner problem at one θ, as a host function sees it; arrays are NumPy's.

    - `theta`: θ with NumPy leaves.
    - `residual(x)`: F, like x, zero at the solution: for a minimisation its gradient.
    - `product(x, v)`: the Jacobian of F, or the Hessian, at x times v, like x.
    - `objective(x)`: what is minimised; only of a minimisation.
    - `tolerance`: the Euclidean norm of F at which the caller will stop.

    The functions take and return what is like x0, and are compiled.
    """

    def __init__(self, run: HostRun, like: PyTree):
        self.theta = run.theta
        self.tolerance = run.tolerance
        self._functions = run.functions
        self._like = like

    def residual(self, x: PyTree) -> PyTree:
        """F at x, like x."""
        return self.unflatten(self._functions["residual"](flatten(x)))

    def product(self, x: PyTree, v: PyTree) -> PyTree:
        """The Jacobian of F at x times v, like x."""
        return self.unflatten(self._functions["product"](flatten(x), flatten(v)))

    def objective(self, x: PyTree) -> float:
        """What is minimised.

        **Raises:** `TypeError` for a problem that is no minimisation.
        """
        if "objective" not in self._functions:
            msg = "This inner problem has no objective. Use problem.residual(x)."
            raise TypeError(msg)
        return float(self._functions["objective"](flatten(x)))

    def unflatten(self, flat: np.ndarray) -> PyTree:
        """What is like x, of flat coordinates."""
        leaves, structure = jax.tree.flatten(self._like)
        parts: list[Any] = []
        for leaf in leaves:
            size = leaf.size * (2 if np.issubdtype(leaf.dtype, np.complexfloating) else 1)
            part, flat = flat[:size], flat[size:]
            if size != leaf.size:
                part = part[: leaf.size] + 1j * part[leaf.size :]
            parts.append(part.reshape(leaf.shape))
        return jax.tree.unflatten(structure, parts)


def flatten(x: PyTree) -> np.ndarray:
    """Flat real coordinates: of a complex leaf the real parts, then the imaginary ones.

    >>> flatten({"a": np.array([1.0 + 2.0j]), "b": 3.0})
    array([1., 2., 3.])
    """
    parts: list[np.ndarray] = []
    leaves: list[Any] = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    for leaf in leaves:
        parts.append(np.ravel(leaf.real))
        if np.iscomplexobj(leaf):
            parts.append(np.ravel(leaf.imag))
    return np.concatenate(parts).astype(float)


class Host(BlackBox):
    """A host function; made by [`host`][]."""

    linear_adjoint: ClassVar[bool] = False
    conditioned: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    function: Callable[..., Any] = eqx.field(static=True)

    @property
    def title(self) -> str:
        """The function's name."""
        return f"host({name_of(self.function)})"

    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """A call of the function."""
        flat = FlatProblem(problem, asked.start)
        functions: list[Any] = [flat.residual, flat.product]
        if problem.objective is not None:
            functions.append(flat.objective)
        like = jax.eval_shape(lambda: asked.start)
        scale = asked.target if problem.scale is None else problem.scale

        def body(run: HostRun) -> tuple[Any, int]:
            view = HostProblem(run, like)
            rtol = run.tolerance / float(run.functions["scale"]())
            returned = self.function(view, view.unflatten(run.start), run.iterations, rtol)
            x, count = counted(returned, run.iterations)
            return checked(self.title, x, like), count

        return call_host(
            body,
            problem,
            flat,
            asked,
            functions,
            scale,
            with_arrays=lambda scale: {"scale": lambda: scale if scale > 0 else 1.0},
            with_theta=True,
            failures=(np.linalg.LinAlgError, FloatingPointError),
        )


def host(function: Callable[..., Any]) -> Host:
    """Any function on the host as an inner solver: a black box.

    The function is called from compiled code, with NumPy arrays, once a sample under vmap.  Its
    answer is confirmed by the true residual, so that it may well say more than it did.  Calls to
    JAX inside are allowed. NaN in its answer, a `LinAlgError` or `FloatingPointError` is a failed
    solve whose gradient is NaN; what else it raises ends the computation with JAX's error for
    callbacks, which shows it.  It does not unroll: use `Implicit`.

    **Arguments:**

    - `function`: (problem, x0, iterations, rtol) -> x, or (x, iterations done). `problem` is a
        `HostProblem` with `theta`, `residual`, `product`, `objective` and `tolerance`; x0 is the
        start; `iterations`, an `int`, is the most to do and taken for done where it says
        nothing of it; `rtol` is the residual norm asked for over `solution.scale`. x is like
        x0. It must depend on nothing else than these and on constants.

    **Raises:** `TypeError` for what cannot be called like this; a solve raises JAX's error for
    callbacks, which shows a `TypeError`, for an answer of another structure or shape.

    >>> import bilevel as bl, bilevel_solvers
    >>> def newton(problem, x, iterations, rtol):
    ...     for count in range(iterations):
    ...         residual = problem.residual(x)
    ...         if abs(residual) <= problem.tolerance:
    ...             return x, count
    ...         x = x - residual / problem.product(x, 1.0)
    ...     return x
    >>> problem = bl.RootFinding(lambda x, theta: x**3 - theta)
    >>> solution = bl.solve(problem, 8.0, 1.5, solver=bilevel_solvers.host(newton))
    >>> round(float(solution.value), 4), int(solution.iterations) < 9
    (2.0, True)
    """
    check_callable("host", "function", function, ("problem", "x0", "iterations", "rtol"))
    return Host(function=function)


def counted(returned: Any, iterations: int) -> tuple[Any, int]:
    """The answer, and the iterations that it says it took."""
    if isinstance(returned, tuple) and len(returned) == 2:
        x, count = returned
        if _is_count(count):
            return x, min(int(count), iterations)
    return returned, iterations


def _is_count(count: Any) -> bool:
    """Whether it is a whole number, of Python, NumPy or JAX."""
    if isinstance(count, bool) or np.ndim(count):
        return False
    number = np.asarray(count)
    return number.dtype.kind in "iu" or (number.dtype.kind == "f" and float(number).is_integer())


def checked(owner: str, x: Any, like: PyTree) -> np.ndarray:
    """The answer in flat coordinates.

    **Raises:** `TypeError` for one that is not like x0.
    """
    expected, got = jax.tree.structure(like), jax.tree.structure(x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    real = [not np.issubdtype(leaf.dtype, np.complexfloating) for leaf in jax.tree.leaves(like)]
    if expected != got or shapes != [leaf.shape for leaf in leaves]:
        msg = (
            f"{owner} must return x like x0, {expected} with the shapes {shapes}, or such an x and "
            "a whole number, the iterations it took; got "
            f"{got} with the shapes {[leaf.shape for leaf in leaves]}."
        )
        raise TypeError(msg)
    for leaf, is_real in zip(leaves, real, strict=True):
        if leaf.dtype.kind not in ("fiu" if is_real else "fiuc"):
            msg = f"{owner} must return x of real or complex numbers like x0, got {leaf.dtype}."
            raise TypeError(msg)
    wide = [
        leaf if is_real else leaf.astype(complex)
        for leaf, is_real in zip(leaves, real, strict=True)
    ]
    return flatten(wide)


def name_of(function: Any) -> str:
    """What a function is called."""
    return str(getattr(function, "__name__", type(function).__name__))
