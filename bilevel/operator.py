"""Linear operators: what the solvers of linear systems see."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from bilevel import vector


class LinearOperator(eqx.Module):
    """A linear map of a vector space to itself, given by what it does to a vector.

    **Arguments:**

    - `matvec`: v -> A v, both like the unknown.
    - `rmatvec`: v -> Aᴴ v, the adjoint (the transpose where everything is real). Found by
        transposing `matvec` automatically when it is not given.
    - `diagonal`: the diagonal of A, like the unknown; needed by Jacobi.
    - `matrix`: the dense matrix, where there is one.
    - `symmetric`: whether A = Aᴴ; `None` for unknown.
    - `positive_definite`: whether A is also positive definite; `None` for unknown.
    - `real_linear`: whether A is linear over the reals only, as the Hessian of complex
        unknowns is. Adjoints and inner products are then those of the real space.
    - `kernel`: of a symmetric A a vector that A maps to zero, where one is known; no system
        has a solution whose right-hand side has a part along it.
    - `source`: the object that it was made of, for solvers and preconditioners that know
        its structure; the adjoint gets `source.transposed()` where it has such a method.

    >>> import jax.numpy as jnp
    >>> operator = LinearOperator(lambda v: 2.0 * v, symmetric=True)
    >>> float(operator.matvec(jnp.float32(3.0)))
    6.0
    """

    matvec: Callable[[Any], Any]
    rmatvec: Callable[[Any], Any] | None = None
    diagonal: PyTree | None = None
    matrix: Array | None = None
    symmetric: bool | None = eqx.field(static=True, default=None)
    positive_definite: bool | None = eqx.field(static=True, default=None)
    real_linear: bool = eqx.field(static=True, default=False)
    source: Any = None
    kernel: PyTree | None = None

    def transposed(self, like: PyTree) -> "LinearOperator":
        """The plain (unconjugated) transpose, acting on vectors like `like`.

        The adjoint of a solve in JAX's convention is a solve with this operator.
        """
        conjugate = vector.conjugate
        if self.symmetric:

            def matvec(v: Any) -> Any:
                return conjugate(self.matvec(conjugate(v)))

            rmatvec = matvec
        elif self.rmatvec is not None:
            adjoint = self.rmatvec

            def matvec(v: Any) -> Any:
                return conjugate(adjoint(conjugate(v)))

            def rmatvec(v: Any) -> Any:
                return conjugate(self.matvec(conjugate(v)))
        else:
            transpose = jax.linear_transpose(self.matvec, like)

            def matvec(v: Any) -> Any:
                return transpose(v)[0]

            def rmatvec(v: Any) -> Any:
                return conjugate(self.matvec(conjugate(v)))

        return LinearOperator(
            matvec,
            rmatvec,
            diagonal=self.diagonal,
            matrix=None if self.matrix is None else self.matrix.T,
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
            real_linear=self.real_linear,
            source=_transposed_source(self.source, symmetric=self.symmetric),
            kernel=None if self.kernel is None else conjugate(self.kernel),
        )

    def adjoint_matvec(self, like: PyTree) -> Callable[[Any], Any]:
        """v -> Aᴴ v, transposing `matvec` where no adjoint was given."""
        if self.symmetric:
            return self.matvec
        if self.rmatvec is not None:
            return self.rmatvec
        transpose = jax.linear_transpose(self.matvec, like)
        return lambda v: vector.conjugate(transpose(vector.conjugate(v))[0])


def as_operator(
    operator: object,
    *,
    symmetric: bool | None = None,
    positive_definite: bool | None = None,
) -> LinearOperator:
    """Make a [`LinearOperator`][] of what a user gave.

    **Arguments:**

    - `operator`: a square matrix (n, n), also a sparse one of JAX; a function v -> A v; a
        pair of functions (v -> A v, v -> Aᴴ v); or any object with a method `matvec` and optionally
        `rmatvec`, `diagonal` (a method or an array), `symmetric`, `positive_definite`,
        `kernel` (a method; see [`LinearOperator`][]), `shape` (a pair must be equal numbers).
    - `symmetric`, `positive_definite`: what the user declares; wins over what the
        object says of itself.

    **Raises:** `TypeError` for anything else, `ValueError` for a matrix that is not
    square.
    """

    def declared(name: str, *, given: bool | None) -> bool | None:
        if given is not None:
            return given
        value = getattr(operator, name, None)
        return value if isinstance(value, bool) else None

    symmetric = declared("symmetric", given=symmetric)
    positive_definite = declared("positive_definite", given=positive_definite)
    if positive_definite and symmetric is None:
        symmetric = True
    if isinstance(operator, LinearOperator):
        return LinearOperator(
            operator.matvec,
            operator.rmatvec,
            operator.diagonal,
            operator.matrix,
            symmetric,
            positive_definite,
            operator.real_linear,
            operator.source,
            operator.kernel,
        )
    if isinstance(operator, jax.Array | np.ndarray):
        return _from_matrix(
            jnp.asarray(operator), symmetric=symmetric, positive_definite=positive_definite
        )
    if type(operator).__module__.startswith("scipy."):
        msg = (
            f"LinearSystem: a {type(operator).__name__} from SciPy runs on the host and cannot be "
            "traced. Give bilevel_pde.from_scipy(matrix), a sparse operator in JAX, or a dense "
            "array (matrix.toarray())."
        )
        raise TypeError(msg)
    if type(operator).__module__.startswith("jax.experimental.sparse"):
        return _from_sparse(operator, symmetric=symmetric, positive_definite=positive_definite)
    matvec: Any = getattr(operator, "matvec", None)
    if callable(matvec):
        _require_square(operator)
        diagonal: Any = getattr(operator, "diagonal", None)
        rmatvec: Any = getattr(operator, "rmatvec", None)
        return LinearOperator(
            matvec,
            rmatvec if callable(rmatvec) else None,
            diagonal() if callable(diagonal) else diagonal,
            None,
            symmetric,
            positive_definite,
            source=operator,
            kernel=_known_kernel(operator, symmetric=symmetric),
        )
    if isinstance(operator, tuple):
        functions: tuple[Any, ...] = operator
        if len(functions) == 2 and all(callable(function) for function in functions):
            return LinearOperator(
                functions[0], functions[1], None, None, symmetric, positive_definite
            )
    if callable(operator):
        return LinearOperator(operator, None, None, None, symmetric, positive_definite)
    msg = (
        "LinearSystem: the operator must be a square matrix, a matvec function, a pair (matvec, "
        "rmatvec) or an object with a matvec method, got "
        f"{type(operator).__name__}. Return one of these from operator(theta)."
    )
    raise TypeError(msg)


def _from_matrix(
    matrix: Array, *, symmetric: bool | None, positive_definite: bool | None
) -> LinearOperator:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        msg = (
            f"LinearSystem: the matrix must be square, got shape {matrix.shape}. For least squares "
            "use Minimization, or the normal equations as a matvec function."
        )
        raise ValueError(msg)
    return LinearOperator(
        matvec=lambda v: matrix @ v,
        # v @ A instead of A.T @ v: XLA's CPU back end is 4.5 times slower on the latter.
        rmatvec=lambda v: _vector_matrix(v, matrix),
        diagonal=jnp.diagonal(matrix),
        matrix=matrix,
        symmetric=symmetric,
        positive_definite=positive_definite,
    )


def _from_sparse(
    matrix: Any, *, symmetric: bool | None, positive_definite: bool | None
) -> LinearOperator:
    """A sparse matrix of JAX (BCOO, BCSR), by its products alone."""
    _require_square(matrix)
    return LinearOperator(
        lambda v: matrix @ v, symmetric=symmetric, positive_definite=positive_definite
    )


def _require_square(operator: object) -> None:
    shape: Any = getattr(operator, "shape", None)
    if isinstance(shape, tuple) and len(shape) == 2 and shape[0] != shape[1]:
        msg = (
            f"LinearSystem: the {type(operator).__name__} must be square, got shape {shape}. For "
            "least squares use Minimization, or the normal equations as a matvec function."
        )
        raise ValueError(msg)


def _known_kernel(operator: object, *, symmetric: bool | None) -> PyTree | None:
    kernel: Any = getattr(operator, "kernel", None)
    # The range of an operator that is not symmetric is not what is orthogonal to its kernel.
    return kernel() if symmetric and callable(kernel) else None


def _vector_matrix(v: Array, matrix: Array) -> Array:
    return (v.conj().T @ matrix).conj().T if jnp.iscomplexobj(matrix) else (v.T @ matrix).T


def _transposed_source(source: Any, *, symmetric: bool | None) -> Any:
    if source is None or symmetric:
        return source
    transposed: Any = getattr(source, "transposed", None)
    return transposed() if callable(transposed) else None
