"""AlgebraicMultigrid: a hierarchy made by PyAMG on the host, cycles in JAX."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel.solver.parameter import whole
from bilevel_pde.materialise import materialise
from bilevel_pde.operator import Operator
from bilevel_pde.scipy_matrix import concrete_matrix, from_scipy
from bilevel_pde.smoother import ChebyshevSmoother

Method = Literal["ruge_stuben", "smoothed_aggregation"]
BUILDERS = {
    "ruge_stuben": "ruge_stuben_solver",
    "smoothed_aggregation": "smoothed_aggregation_solver",
}


class Level(eqx.Module):
    """A level and the way to the next coarser one.

    - `operator`: A; `prolong`: P; `restrict`: R, PᵀA-like and rectangular.
    - `upper`: an estimate from above of the largest eigenvalue of D⁻¹A.
    """

    operator: Operator
    prolong: Operator
    restrict: Operator
    upper: Float[Array, ""]

    def transposed(self) -> "Level":
        """Of Aᵀ."""
        return Level(
            self.operator.transposed(),
            self.restrict.transposed(),
            self.prolong.transposed(),
            self.upper,
        )


class AlgebraicMultigrid(eqx.Module):
    """One V-cycle of algebraic multigrid as a preconditioner, for assembled matrices.

    [PyAMG](https://github.com/pyamg/pyamg) makes the hierarchy from the numbers of a matrix,
    once, on the host (`pip install pyamg`); cycles run in JAX, under jit, grad and
    on accelerators.  As the numbers must be known, the matrix is given here and not found in
    the problem: one near the problem's own will do, such as that of the first θ, since a
    preconditioner changes how fast a system is solved and never its solution.

    Smoothing is by Chebyshev polynomials before and after the coarse correction, and for a
    symmetric matrix the cycle is symmetric, as conjugate gradients need it.  For a matrix
    that is not, `.T` is the preconditioner of the transposed system, for an adjoint solver
    of its own: `estimator=bl.Implicit(solver=bl.GMRES(preconditioner=preconditioner.T))`.

    **Arguments:**

    - `matrix`: a `scipy.sparse` matrix or an operator of this adapter, square, not traced.
    - `method`: `"ruge_stuben"` (default) for scalar elliptic equations, or
        `"smoothed_aggregation"`, also for systems such as elasticity.
    - `degree`: of the smoothing polynomial, applications of the operator.
    - `options`: further arguments of PyAMG's `ruge_stuben_solver` or
        `smoothed_aggregation_solver`, such as `{"B": rigid_body_modes}`.

    **Raises:** `ImportError` without PyAMG, `IncompatibleError` for a traced matrix,
    `TypeError` for one that is not float32 or float64, `ValueError` for one that is empty, not
    square or not finite, or has zeros on its diagonal, and for another method.

    Ruge & Stüben, in Multigrid Methods, SIAM 1987; Vaněk, Mandel & Brezina, Computing 56, 1996.
    """

    levels: tuple[Level, ...]
    coarsest: Float[Array, "m m"]
    size: int = eqx.field(static=True)
    degree: int = eqx.field(static=True)

    def __init__(
        self,
        matrix: Any,
        *,
        method: Method = "ruge_stuben",
        degree: int = 2,
        options: Mapping[str, Any] | None = None,
    ):
        if method not in BUILDERS:
            msg = f"AlgebraicMultigrid: method should be one of {sorted(BUILDERS)}, got {method!r}."
            raise ValueError(msg)
        whole("AlgebraicMultigrid", "degree", degree)
        csr = _concrete(matrix)
        build = getattr(_pyamg(), BUILDERS[method])
        symmetric = abs(csr - csr.T).max() <= 1e-12 * abs(csr).max()
        given = dict(options or {})
        if method == "smoothed_aggregation":
            given.setdefault("symmetry", "symmetric" if symmetric else "nonsymmetric")
        # Solvers of its own would be made and never used.
        given = {"presmoother": None, "postsmoother": None, "coarse_solver": None} | given
        dtype = jax.dtypes.canonicalize_dtype(csr.dtype)
        # PyAMG's kernels take 32-bit indices of sparse matrices.
        found = build(sp.csr_matrix(csr.astype(float)), **given).levels
        self.levels = tuple(
            Level(
                from_scipy(level.A.astype(dtype)),
                from_scipy(level.P.tocsr().astype(dtype)),
                from_scipy(level.R.tocsr().astype(dtype)),
                jnp.asarray(_upper(level.A), dtype),
            )
            for level in found[:-1]
        )
        dense = found[-1].A.toarray()
        inverse = np.linalg.pinv(dense, rcond=1e-12, hermitian=bool(symmetric))
        self.coarsest = jnp.asarray(inverse, dtype)
        self.size = csr.shape[0]
        self.degree = degree

    @property
    def T(self) -> "AlgebraicMultigrid":  # noqa: N802
        """The preconditioner of Aᵀ: exactly the transposed cycle."""
        made = object.__new__(AlgebraicMultigrid)
        values = {
            "levels": tuple(level.transposed() for level in self.levels),
            "coarsest": self.coarsest.T,
            "size": self.size,
            "degree": self.degree,
        }
        for name, value in values.items():
            object.__setattr__(made, name, value)
        return made

    def __repr__(self) -> str:
        """Size and levels, in one line."""
        sizes = [level.operator.shape[0] for level in self.levels] + [self.coarsest.shape[0]]
        levels = "1 level" if len(sizes) == 1 else f"{len(sizes)} levels"
        down = " → ".join(f"{size:,}" for size in sizes)
        return f"AlgebraicMultigrid({levels} of {down} unknowns, degree={self.degree})"

    def at(self, problem: BoundProblem, x: PyTree) -> Callable[[Any], Any]:
        """V -> M⁻¹ v.

        **Raises:** `IncompatibleError` for unknowns that the matrix does not act on.
        """
        leaves = jax.tree.leaves(x)
        columns = len(leaves) == 1 and leaves[0].ndim == 2 and leaves[0].shape[0] == self.size
        if vector.size(x) == self.size:
            return self._flat
        if columns:
            return jax.vmap(self._flat, in_axes=1, out_axes=1)
        msg = (
            f"AlgebraicMultigrid was made of a matrix with {self.size} rows and cannot "
            f"precondition this {problem.name} with {vector.size(x)} unknowns. "
            "Make it of the problem's matrix."
        )
        raise IncompatibleError(msg)

    def _flat(self, v: PyTree) -> Any:
        flat, unflatten = jax.flatten_util.ravel_pytree(v)
        return unflatten(self._cycle(0, flat))

    def _cycle(self, index: int, b: Array) -> Array:
        if index == len(self.levels):
            return self.coarsest.astype(b.dtype) @ b
        level = self.levels[index]
        smoother = ChebyshevSmoother(self.degree, upper=level.upper.astype(b.dtype))
        x = materialise(smoother.sweep(level.operator, None, b, backward=False))
        coarse = materialise(level.restrict.matvec(materialise(b - level.operator.matvec(x))))
        x = materialise(x + level.prolong.matvec(self._cycle(index + 1, coarse)))
        return smoother.sweep(level.operator, x, b, backward=True)


def _concrete(matrix: Any) -> sp.csr_array:
    """The matrix on the host."""
    instead = "; or use pde.Multigrid, which makes its hierarchy in traced code"
    csr = concrete_matrix("AlgebraicMultigrid", matrix, instead)
    if csr.shape[0] == 0:
        msg = "AlgebraicMultigrid: the matrix has no rows, there is nothing to precondition."
        raise ValueError(msg)
    if not (csr.diagonal() != 0).all():
        msg = (
            "AlgebraicMultigrid: the matrix has zeros on its diagonal, which smoothing divides by. "
            "Use pde.SparseDirect."
        )
        raise ValueError(msg)
    return csr


def _upper(matrix: Any) -> float:
    """An estimate from above of the largest eigenvalue of D⁻¹A, by power iteration."""
    scaled: Any = sp.diags_array(1.0 / matrix.diagonal()) @ sp.csr_array(matrix)
    v = np.random.default_rng(0).standard_normal(matrix.shape[0])
    size = 1.0
    for _ in range(15):
        v = scaled @ v
        size = float(np.linalg.norm(v))
        if size == 0:
            return 1.0
        v /= size
    bound = float(abs(scaled).sum(axis=1).max())
    return min(1.1 * size, bound)


def _pyamg() -> Any:
    try:
        return importlib.import_module("pyamg")
    except ImportError as error:
        msg = "AlgebraicMultigrid needs PyAMG: pip install pyamg"
        raise ImportError(msg) from error
