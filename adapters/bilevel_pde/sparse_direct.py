"""SparseDirect: sparse LU on the host, the exact reference."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.closed import stopped
from bilevel.solver.base import IncompatibleError
from bilevel.solver.direct import Direct
from bilevel_pde.bordered import bordered_entries
from bilevel_pde.factors import Factors
from bilevel_pde.operator import Operator
from bilevel_pde.source import exact_source

FACTORS = Factors()
"""Shared by all [`SparseDirect`][] solvers of a process, so that an adjoint finds the primal's."""


class SparseDirect(Direct):
    """Sparse LU (SciPy's SuperLU) of an operator of this adapter, on the host.

    The factors are found again by the content of the matrix: the adjoint solves with the
    transpose of the primal's, and a later call with the same entries factorises nothing.
    Up to 32 and a gibibyte of them are kept, for all solvers of the process;
    `SparseDirect.forget()` lets them go.  An iteration solves with them and adds the
    correction, so that a second one is a step of iterative refinement.

    The factorisation is in double precision whichever the operator's dtype.  A matrix that
    is singular to rounding (reciprocal condition number below 9e-16, of float32 entries below
    6e-8, after scaling rows and columns) gives NaN for every right-hand side, and the
    status `NONFINITE`, or `INCONSISTENT` where constants are known to be in the kernel and the
    right-hand side has a mean.

    Works under jit, grad and vmap (one sample after another).  On an accelerator each solve
    copies entries and right-hand side to the host and the solution back.

    Entries come from `Operator.entries`, and where an operator has none from its `to_scipy`
    on the host; a [`Mean`][] in it takes one more unknown, and fills nothing.  Of a nonlinear
    step such as [`Burgers`][]' they are those of its Jacobian, so that this checks its adjoint.
    Other operators than this adapter's are refused (`IncompatibleError`).

    >>> import jax, jax.numpy as jnp, scipy.sparse as sp, bilevel as bl, bilevel_pde as pde
    >>> matrix = sp.csr_array([[0.0, 2.0], [1.0, 0.0]])
    >>> problem = bl.LinearSystem(pde.from_scipy(matrix), lambda theta: theta)
    >>> def loss(theta):
    ...     solver = pde.SparseDirect()
    ...     solution = bl.solve(
    ...         problem, theta, jnp.zeros(2), solver=solver, estimator=bl.Implicit(solver=solver)
    ...     )
    ...     return solution.value @ jnp.array([1.0, 10.0])
    >>> value, gradient = jax.value_and_grad(loss)(jnp.array([2.0, 3.0]))
    >>> float(value), [float(g) for g in gradient]
    (13.0, [5.0, 1.0])
    """

    on_host: ClassVar[bool] = True
    instead: ClassVar[str] = "bl.Newton(linear=SparseDirect()) with a Jacobian of this adapter"

    @staticmethod
    def forget() -> None:
        """Let all factors go, to free their memory."""
        FACTORS.clear()

    def check(self, problem: BoundProblem) -> None:
        """Refuse a problem without a square operator of this adapter.

        **Raises:** `IncompatibleError`.
        """
        super().check(problem)
        assert problem.operator is not None
        source = exact_source(problem.operator.source)
        if not isinstance(source, Operator):
            msg = (
                f"SparseDirect cannot solve this {problem.name}: its operator is no operator of "
                "bilevel_pde. Give LinearSystem bilevel_pde.from_scipy(matrix), or use bl.Direct "
                "for a dense matrix or a function."
            )
            raise IncompatibleError(msg)
        rows, columns = source.shape
        if rows != columns:
            msg = f"SparseDirect needs a square operator, got shape ({rows}, {columns})."
            raise IncompatibleError(msg)

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Factorise, or find the factors."""
        assert problem.operator is not None
        operator = problem.operator
        source: Operator = exact_source(operator.source)
        size = source.shape[0]
        host = _Host(source, definite=bool(operator.symmetric and operator.positive_definite))
        key = jax.pure_callback(
            host.factorize,
            jax.ShapeDtypeStruct((KEY,), jnp.uint8),
            *host.arguments,
            vmap_method="sequential",
        )

        def solution(v: PyTree, *, transposed: bool) -> PyTree:
            flat, unflatten = _flat(v, size)
            solved = jax.pure_callback(
                functools.partial(host.solve, flipped=transposed),
                jax.ShapeDtypeStruct(flat.shape, flat.dtype),
                key,
                flat,
                *host.arguments,
                vmap_method="sequential",
            )
            return unflatten(solved)

        def precondition(v: PyTree) -> PyTree:
            return jax.lax.custom_linear_solve(
                operator.matvec,
                v,
                solve=lambda _, b: solution(b, transposed=False),
                transpose_solve=lambda _, b: solution(b, transposed=True),
            )

        return dataclasses.replace(problem, precondition=precondition)


KEY = 17
"""Bytes of a digest, and one that says whether the factors are the transpose's."""


class _Host:
    """The side of the callbacks, which gets arrays and what was known while tracing.

    - `arguments`: what is to be handed to the callbacks.
    """

    def __init__(self, source: Operator, *, definite: bool):
        self.size = source.shape[0]
        self.more = 0
        # What solves a system does not change its solution: no derivative goes through it.
        source = stopped(source)
        self.arguments: list[Any]
        self._assemble: Callable[..., Any]
        try:
            self.more, entries = bordered_entries(source)
        except IncompatibleError:
            arrays, static = eqx.partition(source, eqx.is_array)
            self.arguments, structure = jax.tree.flatten(arrays)
            self._assemble = functools.partial(_to_scipy, structure, static)
        else:
            *indices, values = entries
            values = jax.lax.stop_gradient(values)
            traced = any(isinstance(part, Tracer) for part in indices)
            known = None if traced else tuple(np.asarray(part) for part in indices)
            self.arguments = [values, *indices] if traced else [values]
            self._assemble = functools.partial(_from_entries, self.size + self.more, known)
        # With a border it is not, whatever it was without.
        self.definite = definite and not self.more

    def factorize(self, *arguments: Any) -> np.ndarray:
        """The key of the factors."""
        key, transposed, _ = FACTORS.find(self._matrix(*arguments), definite=self.definite)
        return np.frombuffer(key + bytes([transposed]), np.uint8)

    def solve(self, key: Any, b: Any, *arguments: Any, flipped: bool) -> np.ndarray:
        """A⁻¹b, or A⁻ᵀb if `flipped`, like b; factorises anew if the factors had to go."""
        b = np.asarray(b)
        content = np.asarray(key).tobytes()
        mirrored, factors = bool(content[-1]), FACTORS.get(content[:-1])
        if factors is None:
            _, mirrored, factors = FACTORS.find(self._matrix(*arguments), definite=self.definite)
        padded = np.pad(b, [(0, self.more)] + [(0, 0)] * (b.ndim - 1))
        solved = factors.solve(padded, transposed=mirrored != flipped)
        return solved[: self.size].astype(b.dtype)

    def _matrix(self, *arguments: Any) -> sp.coo_array:
        return sp.coo_array(self._assemble(*map(np.asarray, arguments)))


def _from_entries(size: int, known: Any, values: np.ndarray, *indices: np.ndarray) -> Any:
    return sp.coo_array((values, known or indices), shape=(size, size))


def _to_scipy(structure: Any, static: Any, *arrays: np.ndarray) -> Any:
    return eqx.combine(jax.tree.unflatten(structure, arrays), static).to_scipy()


def _flat(v: PyTree, size: int) -> tuple[Array, Callable[[Array], Any]]:
    """V as a vector, or as one column a right-hand side, and the way back.

    **Raises:** `ValueError` for a v that the operator does not act on.
    """
    leaves = jax.tree.leaves(v)
    found = vector.size(v)
    if found == size:
        return jax.flatten_util.ravel_pytree(v)
    if len(leaves) == 1 and leaves[0].ndim == 2 and leaves[0].shape[0] == size:
        structure = jax.tree.structure(v)
        return leaves[0], lambda solved: jax.tree.unflatten(structure, [solved])
    shapes = [leaf.shape for leaf in leaves]
    msg = f"SparseDirect: the operator has {size} unknowns, the right-hand side shapes {shapes}."
    raise ValueError(msg)
