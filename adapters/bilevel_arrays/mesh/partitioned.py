"""Partitioned: an operator on a grid whose blocks lie on several devices."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import scipy.sparse as sp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from bilevel.bound import BoundProblem
from bilevel_arrays.mesh.composite import grid_of, has_diagonal, in_blocks, specs_of
from bilevel_arrays.mesh.layout import Layout
from bilevel_pde import folding
from bilevel_pde.grid import Grid
from bilevel_pde.multigrid import Multigrid
from bilevel_pde.operator import Operator
from bilevel_pde.smoother import Smoother
from bilevel_pde.theta_method import ThetaMethod

Stepper = TypeVar("Stepper", bound=ThetaMethod)


class Partitioned(Operator):
    """An operator whose fields are cut into blocks, one a device, made by [`partition`][].

    Solvers, estimators and time steppers take it as they take any operator: where they add up,
    the compiler adds up over the devices.  Each application sends the points next to the
    blocks' sides to the neighbours, and nothing else; [`halo_traffic`][] says how much.
    `bilevel_pde.Multigrid` and the smoothers precondition it, in blocks as well.  Add to it from
    the right, or add first and partition then: of `stencil + partitioned` they know nothing.

    - `operator`: the operator as a whole.
    - `block`: what each device does of it.
    - `layout`: the mesh, and which axes of the grid are cut along which of its axes.

    >>> import bilevel_pde as pde
    >>> from bilevel_arrays import mesh
    >>> operator = mesh.partition(-pde.laplacian(pde.Grid(8)), mesh.device_mesh(), "devices")
    >>> (2.0 * operator).positive_definite, operator.T is operator
    (True, True)
    """

    operator: Operator
    block: Any
    layout: Layout = eqx.field(static=True)

    @property
    def grid(self) -> Grid:
        """The grid as a whole."""
        return grid_of(self.operator)

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """A field on the grid."""
        return self.operator.like

    @property
    def symmetric(self) -> bool | None:
        """As of the operator as a whole."""
        return self.operator.symmetric

    @property
    def positive_definite(self) -> bool | None:
        """As of the operator as a whole."""
        return self.operator.positive_definite

    @property
    def singular(self) -> bool:
        """As of the operator as a whole."""
        return self.operator.singular

    def matvec(self, v: Array) -> Array:
        """A v, like v, in blocks."""
        self.layout.check_field("Partitioned.matvec", v)
        return _apply(self.block, folding.checked(self.grid, v), self.layout)

    def rmatvec(self, v: Array) -> Array:
        """Aᵀ v, like v: what an application read of a neighbour is sent back to it."""
        if self.symmetric:
            return self.matvec(v)
        self.layout.check_field("Partitioned.rmatvec", v)
        v = folding.checked(self.grid, v)
        return jax.linear_transpose(self.matvec, jax.ShapeDtypeStruct(v.shape, v.dtype))(v)[0]

    def transposed(self) -> "Partitioned":
        """Aᵀ, partitioned alike."""
        return self if self.symmetric else _partitioned(self.operator.transposed(), self.layout)

    def diagonal(self) -> Float[Array, "..."] | None:
        """The diagonal, in blocks; `None` of what has a product in it."""
        if not has_diagonal(self.block):
            return None
        return _diagonal(self.block, self.layout)

    def to_scipy(self) -> sp.csr_array:
        """The matrix as a whole, on the host."""
        return self.operator.to_scipy()

    def entries(self) -> tuple[Any, Any, Array]:
        """Those of the operator as a whole."""
        return self.operator.entries()

    def kernel(self) -> Array | None:
        """Constants, in blocks, where they are known to be mapped to zero."""
        if not self.singular:
            return None
        return jnp.ones(self.like.shape, self.like.dtype, device=self.layout.sharding)

    def multigrid_inverse(
        self, multigrid: Multigrid, problem: BoundProblem
    ) -> Callable[[Array], Array]:
        """V -> M⁻¹ v, a multigrid cycle in blocks; what `bilevel_pde.Multigrid` asks for.

        **Raises:** what `bilevel_pde.Multigrid` raises of the operator as a whole.
        """
        from bilevel_arrays.mesh.cycle import multigrid_inverse  # noqa: PLC0415

        return multigrid_inverse(multigrid, problem, self)

    def smoothed(self, smoother: Smoother, v: Array) -> Array:
        """M⁻¹ v by the sweeps of a smoother in blocks; what a smoother asks for."""
        return _smooth(smoother, self.block, v, self.layout)

    def __add__(self, other: Operator) -> Operator:
        """A + B, partitioned like A."""
        if not isinstance(other, Operator):
            return NotImplemented
        if isinstance(other, Partitioned):
            if other.layout != self.layout:
                msg = (
                    "Partitioned: operators that are added should be partitioned alike, got "
                    f"{self.layout.spec} and {other.layout.spec}. Add them first, then partition."
                )
                raise ValueError(msg)
            other = other.operator
        return _partitioned(self.operator + other, self.layout)

    def __mul__(self, factor: Array | float) -> Operator:
        """C A for a number c, partitioned like A."""
        return _partitioned(self.operator * factor, self.layout)

    def __matmul__(self, other: Any) -> Any:
        """A @ B, partitioned like A, or A @ v, a field."""
        if isinstance(other, Operator):
            whole = other.operator if isinstance(other, Partitioned) else other
            return _partitioned(self.operator @ whole, self.layout)
        return super().__matmul__(other)


@overload
def partition(
    operator: Operator,
    mesh: Mesh,
    axes: str | Sequence[str | None] | None = None,
    *,
    gather_below: int = 4096,
) -> Partitioned: ...
@overload
def partition(
    operator: Stepper,
    mesh: Mesh,
    axes: str | Sequence[str | None] | None = None,
    *,
    gather_below: int = 4096,
) -> Stepper: ...
def partition(
    operator: Any,
    mesh: Mesh,
    axes: str | Sequence[str | None] | None = None,
    *,
    gather_below: int = 4096,
) -> Any:
    """An operator, or a time stepper, whose fields are cut into blocks over a mesh of devices.

    **Arguments:**

    - `operator`: of `bilevel_pde` on a regular grid: what `laplacian`, `advection`, `helmholtz`,
        `biharmonic` and `identity` make, `Stencil`, `Diffusion`, `Mean`, and their sums, multiples
        and products; or the steppers `Heat` and `AdvectionDiffusion`.
    - `mesh`: the devices, as of [`device_mesh`][]; of one process or of several.
    - `axes`: for each axis of the grid the mesh axis that it is cut along, or `None` for one that
        is not cut; one name for slabs of the first axis. By default the mesh's axes for the first
        axes of the grid. One mesh axis makes slabs, two or three make blocks.
    - `gather_below`: in a multigrid cycle grids of at most so many points are held whole by every
        device: there messages cost more than the work.

    **Returns:** a [`Partitioned`][] operator; of a stepper one of the same kind whose steps are
    solved with such operators. Their numbers are those of one device up to the order of sums.

    **Raises:** `TypeError` for other operators and meshes, `ValueError` for a mesh axis that there
    is not, a mesh that does not divide the grid, and blocks thinner than what the operator reads of
    a neighbour.

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_pde as pde
    >>> from bilevel_arrays import mesh
    >>> grid, devices = pde.Grid((16, 16)), mesh.device_mesh()
    >>> f = mesh.place(jnp.ones(grid.shape), devices, "devices")
    >>> operator = mesh.partition(-pde.laplacian(grid), devices)
    >>> solver = bl.ConjugateGradient(preconditioner=pde.Multigrid())
    >>> solution = bl.solve(bl.LinearSystem(operator, f), None, 0 * f, solver=solver)
    >>> int(solution.status)
    0
    """
    if isinstance(operator, ThetaMethod):
        layout = Layout.of(operator.grid, mesh, axes, gather_below)
        eqx.filter_eval_shape(lambda stepper: in_blocks(stepper.matrix(), layout), operator)
        return operator.arranged(Arrangement(layout))
    if isinstance(operator, Partitioned):
        operator = operator.operator
    if not isinstance(operator, Operator):
        msg = (
            "partition: operator should be an operator of bilevel_pde on a regular grid, or one of "
            f"the steppers Heat and AdvectionDiffusion, got {type(operator).__name__}."
        )
        raise TypeError(msg)
    return _partitioned(operator, Layout.of(grid_of(operator), mesh, axes, gather_below))


class Arrangement(eqx.Module):
    """What makes the operators of a stepper partitioned ones."""

    layout: Layout = eqx.field(static=True)

    def __call__(self, operator: Operator) -> Partitioned:
        """The operator in blocks."""
        return _partitioned(operator, self.layout)


def _partitioned(operator: Operator, layout: Layout) -> Partitioned:
    return Partitioned(operator, in_blocks(operator, layout), layout)


def mapped(function: Callable[..., Any], layout: Layout, tree: Any, *fields: Array) -> Any:
    """`function(tree, *fields)` of blocks, whose result is a block."""
    arrays, static = eqx.partition(tree, eqx.is_array)

    def body(arrays: Any, *fields: Array) -> Any:
        return function(eqx.combine(arrays, static), *fields)

    specs = (specs_of(arrays, layout), *(layout.spec for _ in fields))
    return jax.shard_map(body, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec)(
        arrays, *fields
    )


@eqx.filter_jit
def _apply(block: Any, v: Array, layout: Layout) -> Array:
    return mapped(lambda block, v: block.matvec(v), layout, block, v)


@eqx.filter_jit
def _diagonal(block: Any, layout: Layout) -> Array:
    return mapped(lambda block: block.diagonal(), layout, block)


@eqx.filter_jit
def _smooth(smoother: Smoother, block: Any, v: Array, layout: Layout) -> Array:
    def sweep(both: Any, v: Array) -> Array:
        smoother, block = both
        return smoother.sweep(block, None, v, backward=False)

    return mapped(sweep, layout, (smoother, block), v)
