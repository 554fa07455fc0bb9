"""Boundary conditions: what a point outside the grid is worth, in terms of points inside it."""

import abc
import dataclasses
import math
from typing import Literal, NamedTuple

Centering = Literal["vertex", "cell"]


class Ghost(NamedTuple):
    """The value one spacing outside: first·u₀ + second·u₁ + source·g.

    u₀ is the first unknown on that side, u₁ the next one inwards, g the boundary value.
    """

    first: float
    second: float
    source: float

    @property
    def conductance(self) -> float:
        """C in the outward flux k (c u₀ - s g) / h through the boundary."""
        return -self.first / 2 if self.second else 1.0 - self.first

    @property
    def flux_source(self) -> float:
        """S in the outward flux k (c u₀ - s g) / h through the boundary."""
        return self.source / 2 if self.second else self.source


@dataclasses.dataclass(frozen=True)
class Boundary(abc.ABC):
    """A condition on one side of a grid.

    One of [`Dirichlet`][], [`Neumann`][], [`Robin`][] and [`Periodic`][].  Operators act with
    a boundary value g = 0; `operator.boundary_term(values)` is what other values add.
    """

    @abc.abstractmethod
    def ghost(self, centering: Centering, spacing: float) -> Ghost | None:
        """The value one spacing outside; `None` on a periodic side."""

    @property
    def on_boundary(self) -> bool:
        """Whether the point on the boundary is an unknown of a vertex-centred grid."""
        return False


@dataclasses.dataclass(frozen=True)
class Dirichlet(Boundary):
    """U = g. Vertex-centred unknowns start one spacing inside, cell-centred ones half of it.

    >>> Dirichlet().ghost("cell", 0.1)
    Ghost(first=-1.0, second=0.0, source=2.0)
    """

    def ghost(self, centering: Centering, spacing: float) -> Ghost:
        """The boundary value itself, or what makes the mean on the face equal to it."""
        if centering == "vertex":
            return Ghost(0.0, 0.0, 1.0)
        return Ghost(-1.0, 0.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Neumann(Boundary):
    """∂u/∂n = g, n pointing outwards. Vertex-centred unknowns start on the boundary.

    Of vertex-centred unknowns the row on the boundary has half a control volume, so that
    operators are symmetric only in the inner product of `grid.weights()`; with cell-centred
    ones they are symmetric as they stand.

    >>> Neumann().ghost("vertex", 0.1)
    Ghost(first=0.0, second=1.0, source=0.2)
    """

    def ghost(self, centering: Centering, spacing: float) -> Ghost:
        """A mirror image plus the slope."""
        if centering == "vertex":
            return Ghost(0.0, 1.0, 2 * spacing)
        return Ghost(1.0, 0.0, spacing)

    @property
    def on_boundary(self) -> bool:
        """It is unknown there."""
        return True


@dataclasses.dataclass(frozen=True)
class Robin(Boundary):
    """A u + b ∂u/∂n = g, n pointing outwards.

    **Arguments:**

    - `value`: a, without unit.
    - `slope`: b, a length, not zero. a and b of one sign make -Δ positive definite.

    **Raises:** `ValueError` for b = 0 (that is `Dirichlet`) and numbers that are not finite.

    >>> Robin(1.0, 2.0).slope
    2.0
    """

    value: float
    slope: float

    def __post_init__(self) -> None:
        """Refuse what is no Robin condition."""
        if not (math.isfinite(self.value) and math.isfinite(self.slope)) or self.slope == 0:
            msg = (
                f"Robin: value u + slope ∂u/∂n = g takes finite numbers and a slope that is not "
                f"zero, got value={self.value}, slope={self.slope}. For u = g use Dirichlet()."
            )
            raise ValueError(msg)

    def ghost(self, centering: Centering, spacing: float) -> Ghost:
        """Central differences across the boundary."""
        if centering == "vertex":
            return Ghost(-2 * spacing * self.value / self.slope, 1.0, 2 * spacing / self.slope)
        scale = self.value / 2 + self.slope / spacing
        if scale == 0:
            msg = (
                f"Robin: value={self.value} and slope={self.slope} cancel on a grid of spacing "
                f"{spacing}: value/2 + slope/spacing = 0. Use another number of points."
            )
            raise ValueError(msg)
        return Ghost((self.slope / spacing - self.value / 2) / scale, 0.0, 1.0 / scale)

    @property
    def on_boundary(self) -> bool:
        """It is unknown there."""
        return True


@dataclasses.dataclass(frozen=True)
class Periodic(Boundary):
    """The last point is next to the first one; both sides of an axis have it.

    >>> Periodic().ghost("cell", 0.1) is None
    True
    """

    def ghost(self, centering: Centering, spacing: float) -> None:
        """No point is outside."""
        return
