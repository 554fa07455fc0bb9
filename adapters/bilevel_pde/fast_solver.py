"""FastSolver: constant coefficients inverted exactly, by transforms along the axes."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel_pde.axis_transform import AxisTransform
from bilevel_pde.definiteness import Offset, is_varied
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.mean_shift import shifted_operator, with_mean
from bilevel_pde.operator import Operator
from bilevel_pde.shift import shift
from bilevel_pde.stencil import Stencil
from bilevel_pde.weighting import as_discretised, without_mean


class FastSolver(eqx.Module):
    """The exact inverse of a stencil with constant coefficients.

    Along each axis the field is expanded in eigenvectors of second differences: sines,
    cosines or exponentials, by FFT where that is faster; Robin sides and pairs of different
    kinds take a dense matrix an axis.  The coefficients may be traced.  As a solver it is
    `bl.Richardson(1.0, preconditioner=pde.FastSolver())`, which takes one iteration.  Where
    constant fields are in the kernel (periodic or Neumann sides all around), they are left
    out; an operator plus a multiple of [`Mean`][] is taken, too.

    Offsets are next neighbours along an axis; where all axes are periodic, any.  The two
    coefficients of an axis must be equal, unless it is periodic; a `Diffusion` takes a number
    for each axis.  What varies from point to point is refused; where that cannot be
    seen before the numbers are known (a stencil that varies along one axis), the result is NaN
    and the status `NONFINITE`.

    **Arguments:**

    - `operator`: what to invert instead of the problem's own operator, such as one with
        coefficients averaged over the grid to precondition one where they vary.

    **Raises:** `IncompatibleError` for an `operator` that it cannot invert.

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_pde as pde
    >>> grid = pde.Grid((20, 30), boundary=[pde.Neumann(), pde.Periodic()], centering="cell")
    >>> problem = bl.LinearSystem(pde.identity(grid) - pde.laplacian(grid), jnp.ones(grid.shape))
    >>> solver = bl.Richardson(1.0, preconditioner=pde.FastSolver())
    >>> solution = bl.solve(
    ...     problem, None, jnp.zeros(grid.shape), solver=solver, budget=bl.Budget(9, rtol=1e-3)
    ... )
    >>> int(solution.iterations), round(float(solution.value[3, 4]), 3)
    (1, 1.0)
    """

    operator: Operator | None = None

    def __check_init__(self) -> None:
        """Refuse an operator that cannot be inverted, as far as its numbers are known."""
        operator = self.operator
        if operator is None:
            return
        if not isinstance(operator, Stencil | Diffusion):
            msg = (
                f"FastSolver: operator should be a Stencil or a Diffusion on a regular grid, got "
                f"a {type(operator).__name__}. Use pde.SparseDirect or pde.AlgebraicMultigrid."
            )
            raise IncompatibleError(msg)
        as_discretised(operator, _inverse)

    def at(self, problem: BoundProblem, x: Array) -> Callable[[Array], Array]:
        """V -> A⁻¹ v for the problem's operator.

        **Raises:** `IncompatibleError` for an operator that is not on a grid, has offsets off
        the axes, or coefficients that vary.
        """
        del x
        if self.operator is not None:
            assert isinstance(self.operator, Stencil | Diffusion)
            return as_discretised(self.operator, _inverse)
        operator, factor = shifted_operator(problem, "FastSolver")
        inverse = as_discretised(operator, _inverse)
        return inverse if factor is None else with_mean(operator, factor, inverse)


def _inverse(operator: Stencil | Diffusion) -> Callable[[Array], Array]:
    """V -> A⁻¹ v."""
    grid = operator.grid
    numbers, constant = _numbers(operator)
    if not isinstance(constant, Tracer) and not bool(constant):
        msg = (
            "FastSolver cannot invert this operator: its coefficients vary from point to point, "
            "or differ in the two directions of an axis that is not periodic. Use pde.Multigrid, "
            "or precondition with FastSolver(operator) of another one that is constant."
        )
        raise IncompatibleError(msg)
    transforms = [AxisTransform(grid, axis) for axis in range(grid.ndim)]
    values, size = _eigenvalues(grid, transforms, numbers)
    reciprocal = 1.0 / values
    if operator.singular:
        tolerance = 64 * grid.ndim * jnp.finfo(grid.dtype).eps * size
        kernel = jnp.abs(values) <= tolerance
        reciprocal = jnp.where(kernel, 0.0, 1.0 / jnp.where(kernel, 1.0, values))
    reciprocal = jnp.where(constant, reciprocal, jnp.nan)
    # Real ones first and last, so that they see real fields as long as possible.
    ordered = sorted(transforms, key=lambda transform: transform.kind == "fourier")

    def solve(v: Array) -> Array:
        field: Any = without_mean(grid, v) if operator.singular else v
        for transform in ordered:
            field = transform.forward(field)
        field = field * reciprocal.astype(jnp.promote_types(field.dtype, _like(reciprocal, v)))
        for transform in reversed(ordered):
            field = transform.backward(field)
        if not jnp.iscomplexobj(v):
            field = field.real
        field = without_mean(grid, field) if operator.singular else field
        return field.astype(v.dtype)

    return solve


def _eigenvalues(
    grid: Grid, transforms: list[AxisTransform], numbers: dict[Offset, Any]
) -> tuple[Any, Any]:
    """Of a stencil of numbers, and a bound of their size."""
    values: Any = numbers[(0,) * grid.ndim]
    size: Any = jnp.abs(values)
    if all(transform.kind == "fourier" for transform in transforms):
        phases = np.meshgrid(*[transform.eigenvalues for transform in transforms], indexing="ij")
        for offset, number in numbers.items():
            if any(offset):
                wave = np.prod([p**o for p, o in zip(phases, offset, strict=True)], axis=0)
                real, imaginary = (jnp.asarray(part, grid.dtype) for part in (wave.real, wave.imag))
                values = values + jax.lax.complex(number * real, number * imaginary)
                size = size + jnp.abs(number)
        return values, size
    for axis, transform in enumerate(transforms):
        low, high = (_number(numbers, grid, axis, step) for step in (-1, 1))
        size = size + jnp.abs(low) + jnp.abs(high)
        shape = [-1 if d == axis else 1 for d in range(grid.ndim)]
        along: Any = transform.eigenvalues.reshape(shape)
        if transform.kind == "fourier":
            cosine, sine = (jnp.asarray(part, grid.dtype) for part in (along.real, along.imag))
            values = values + jax.lax.complex((low + high) * cosine, (high - low) * sine)
        else:
            values = values + high * jnp.asarray(along, grid.dtype)
    return values, size


def _like(reciprocal: Array, v: Array) -> Any:
    """The dtype of the eigenvalues in the precision of the field."""
    real = jnp.finfo(v.dtype).dtype
    return jnp.promote_types(real, jnp.complex64) if jnp.iscomplexobj(reciprocal) else real


def _number(numbers: dict[Offset, Any], grid: Grid, axis: int, step: int) -> Any:
    offset = tuple(step * int(d == axis) for d in range(grid.ndim))
    return numbers.get(offset, jnp.zeros((), grid.dtype))


def _numbers(operator: Stencil | Diffusion) -> tuple[dict[Offset, Any], Bool[Array, ""] | bool]:
    """The coefficient of each offset inside, and whether it is that of all points."""
    stencil = operator.stencil() if isinstance(operator, Diffusion) else operator
    grid = stencil.grid
    centre = (0,) * grid.ndim
    varies = isinstance(operator, Diffusion) and any(k.ndim > 0 for k in operator.faces)
    for offset, parts in stencil.terms.items():
        if sum(map(abs, offset)) > 1 and not all(map(grid.is_periodic, range(grid.ndim))):
            msg = (
                f"FastSolver cannot invert this operator: the offset {offset} is no next neighbour "
                "along an axis, and there are sides that are not periodic. Use pde.Multigrid."
            )
            raise IncompatibleError(msg)
        if varies or any(_is_field(grid, piece) for piece in parts):
            msg = (
                f"FastSolver cannot invert this operator: the coefficient of the offset {offset} "
                "varies from point to point. Give it as a number, use pde.Multigrid, or "
                "precondition with FastSolver(operator) of another one that is constant."
            )
            raise IncompatibleError(msg)
    for axis, points in enumerate(grid.shape):
        if points < 3:
            msg = f"FastSolver needs at least 3 points along each axis, got {points} along {axis}."
            raise IncompatibleError(msg + " Use pde.SparseDirect.")
    numbers: dict[Offset, Any] = {
        offset: sum(piece[tuple(min(1, size - 1) for size in piece.shape)] for piece in parts)
        for offset, parts in stencil.terms.items()
    }
    numbers.setdefault(centre, jnp.zeros((), grid.dtype))
    anew = Stencil(grid, numbers, symmetric=False, positive_definite=False)
    tolerance = 1e3 * jnp.finfo(grid.dtype).eps * sum(jnp.abs(c) for c in numbers.values())
    periodic = tuple(grid.is_periodic(axis) for axis in range(grid.ndim))
    ones = jnp.ones(grid.shape, grid.dtype)
    constant: Any = jnp.asarray(True)
    for offset in {*stencil.offsets, *anew.offsets}:
        # What is multiplied with points outside says nothing.
        excess = stencil.coefficient(offset) - anew.coefficient(offset)
        excess = jnp.max(jnp.abs(excess * shift(ones, offset, periodic)))
        constant = constant & ~(excess > tolerance)
    for axis in range(grid.ndim):
        if not grid.is_periodic(axis):
            low, high = (_number(numbers, grid, axis, step) for step in (-1, 1))
            constant = constant & ~(jnp.abs(low - high) > tolerance)
    return numbers, constant


def _is_field(grid: Grid, piece: Any) -> bool:
    """Whether a piece is more than a boundary condition makes of a number."""
    # Multiplied with control volumes and divided by them again, a number is a field, too.
    return is_varied(piece) and all(bool(np.all(weight == 1)) for weight in grid.weights())
