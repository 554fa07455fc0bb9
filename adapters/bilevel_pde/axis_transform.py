"""AxisTransform: what makes second differences along one axis diagonal."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import jax.scipy.fft
import numpy as np
from jaxtyping import Array

from bilevel_pde.boundary import Dirichlet, Neumann
from bilevel_pde.grid import Grid
from bilevel_pde.stencil import Stencil

Kind = Literal["fourier", "sine", "cosine", "cell sine", "cell cosine", "dense"]

LONG = 192
"""From this many points on a fast transform beats a product with a dense matrix."""


@dataclasses.dataclass(frozen=True)
class AxisTransform:
    """The eigenvectors of uᵢ₋₁ + uᵢ₊₁ along one axis, its boundary conditions included.

    Sines and cosines by FFT on long axes between two Dirichlet or two Neumann sides, complex
    exponentials on periodic ones, and a dense matrix of eigenvectors otherwise (Lynch, Rice &
    Thomas, Numer. Math. 6, 1964; Swarztrauber, SIAM Review 19, 1977).

    - `grid`, `axis`: whose.
    """

    grid: Grid
    axis: int

    @functools.cached_property
    def kind(self) -> Kind:
        """Which transform it is."""
        if self.grid.is_periodic(self.axis):
            return "fourier"
        if self.grid.shape[self.axis] < LONG:
            return "dense"
        sides = self.grid.boundary[self.axis]
        cells = self.grid.centering[self.axis] == "cell"
        if all(isinstance(side, Dirichlet) for side in sides):
            return "cell sine" if cells else "sine"
        if all(isinstance(side, Neumann) for side in sides):
            return "cell cosine" if cells else "cosine"
        return "dense"

    @functools.cached_property
    def eigenvalues(self) -> np.ndarray:
        """Of uᵢ₋₁ + uᵢ₊₁, 1-D; on a periodic axis of uᵢ₊₁ alone, which are complex."""
        n = self.grid.shape[self.axis]
        index = np.arange(n)
        if self.kind == "fourier":
            return np.exp(2j * np.pi * index / n)
        if self.kind == "dense":
            return self._dense[0]
        steps = {
            "sine": (index + 1) / (n + 1),
            "cosine": index / (n - 1),
            "cell sine": (index + 1) / n,
            "cell cosine": index / n,
        }[self.kind]
        return 2.0 * np.cos(np.pi * steps)

    def forward(self, field: Array) -> Array:
        """From points to eigenvectors."""
        n = field.shape[self.axis]
        match self.kind:
            case "fourier":
                return jnp.fft.fft(field, axis=self.axis)
            case "sine":
                return self._both(_sine, field) / (n + 1)
            case "cosine":
                return self._both(_cosine, field) / (n - 1)
            case "cell sine":
                return self._both(lambda v: _dct(_alternating(v))[..., ::-1], field)
            case "cell cosine":
                return self._both(_dct, field)
            case "dense":
                return self._both(lambda v: _product(v, self._dense[2]), field)

    def backward(self, field: Array) -> Array:
        """From eigenvectors to points."""
        match self.kind:
            case "fourier":
                return jnp.fft.ifft(field, axis=self.axis)
            case "sine":
                return 0.5 * self._both(_sine, field)
            case "cosine":
                return 0.5 * self._both(_cosine, field)
            case "cell sine":
                return self._both(lambda v: _alternating(_idct(v[..., ::-1])), field)
            case "cell cosine":
                return self._both(_idct, field)
            case "dense":
                return self._both(lambda v: _product(v, self._dense[1]), field)

    def _both(self, function: Callable[[Array], Array], field: Array) -> Array:
        """Apply a real function of the last axis along this one, to both parts of a complex."""
        last = jnp.moveaxis(field, self.axis, -1)
        if jnp.iscomplexobj(last):
            result = jax.lax.complex(function(last.real), function(last.imag))
        else:
            result = function(last)
        return jnp.moveaxis(result, -1, self.axis)

    @functools.cached_property
    def _dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues, eigenvectors V and V⁻¹, in double precision."""
        grid, axis = self.grid, self.axis
        line = Grid(
            grid.shape[axis],
            grid.extent[axis],
            [grid.boundary[axis]],
            grid.centering[axis],
            dtype=grid.dtype,
        )
        ones = np.ones((), grid.dtype)
        with jax.ensure_compile_time_eval():
            both = Stencil(line, {(-1,): ones, (1,): ones}).to_scipy().toarray().astype(float)
        # In the inner product of control volumes the matrix is symmetric.
        root = np.sqrt(np.asarray(line.weights()[0], float))
        values, vectors = np.linalg.eigh(both * root[:, None] / root)
        return values, vectors / root[:, None], vectors.T * root


def _product(field: Array, matrix: np.ndarray) -> Array:
    return jnp.matmul(field, jnp.asarray(matrix.T, field.dtype), precision="highest")


def _sine(field: Array) -> Array:
    """Σⱼ 2 sin(π (j+1)(k+1) / (n+1)) uⱼ, by the FFT of the odd continuation."""
    zero = jnp.zeros((*field.shape[:-1], 1), field.dtype)
    odd = jnp.concatenate([zero, field, zero, -field[..., ::-1]], -1)
    return -jnp.fft.rfft(odd).imag[..., 1:-1]


def _cosine(field: Array) -> Array:
    """u₀ + (-1)ᵏ uₙ₋₁ + Σⱼ 2 cos(π j k / (n-1)) uⱼ, by the FFT of the even continuation."""
    even = jnp.concatenate([field, field[..., -2:0:-1]], -1)
    return jnp.fft.rfft(even).real


def _dct(field: Array) -> Array:
    return jax.scipy.fft.dct(field, norm="ortho")


def _idct(field: Array) -> Array:
    return jax.scipy.fft.idct(field, norm="ortho")


def _alternating(field: Array) -> Array:
    signs = 1 - 2 * (np.arange(field.shape[-1]) % 2)
    return field * jnp.asarray(signs, field.dtype)
