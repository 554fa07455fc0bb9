"""Problems with exact hypergradients: ridge, logistic regression, Poisson control."""

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Array, Float

Exact = tuple[float, np.ndarray]
"""Outer loss and hypergradient, to rounding."""


@dataclass(frozen=True)
class Ridge:
    """P1: ridge regression with one penalty a feature.

    Inner 1/(2m)‖Xw − y‖² + ½ Σ exp(θ_j) w_j², outer 1/(2m)‖Xw − y‖² on validation data.

    - `design` (m, n), `response` (m,), `validation_design`, `validation_response`: data.
    - `theta` (n,): logarithms of the penalties at which everything is measured.
    """

    design: Float[Array, "m n"]
    response: Float[Array, " m"]
    validation_design: Float[Array, "k n"]
    validation_response: Float[Array, " k"]
    theta: Float[Array, " n"]

    @property
    def start(self) -> Float[Array, " n"]:
        """The zero vector, where every inner solve begins."""
        return jnp.zeros_like(self.theta)

    def objective(self, w: Array, theta: Array) -> Array:
        """The inner objective."""
        misfit = self.design @ w - self.response
        return 0.5 * misfit @ misfit / misfit.size + 0.5 * jnp.sum(jnp.exp(theta) * w**2)

    def outer_loss(self, w: Array, theta: Array) -> Array:
        """The validation loss."""
        del theta
        misfit = self.validation_design @ w - self.validation_response
        return 0.5 * misfit @ misfit / misfit.size

    @property
    def lipschitz(self) -> float:
        """Largest eigenvalue of the inner Hessian."""
        return self.spectrum[1]

    @cached_property
    def spectrum(self) -> tuple[float, float]:
        """Least and largest eigenvalue of the inner Hessian."""
        design = np.asarray(self.design)
        hessian = design.T @ design / len(design) + np.diag(np.exp(np.asarray(self.theta)))
        values = scipy.linalg.eigvalsh(hessian)
        return float(values[0]), float(values[-1])

    def exact(self) -> Exact:
        """Outer loss and hypergradient by a Cholesky factorisation."""
        return ridge_by_cholesky(
            np.asarray(self.design),
            np.asarray(self.response),
            np.asarray(self.validation_design),
            np.asarray(self.validation_response),
            np.asarray(self.theta),
        )


def ridge_by_cholesky(
    design: np.ndarray,
    response: np.ndarray,
    validation_design: np.ndarray,
    validation_response: np.ndarray,
    theta: np.ndarray,
) -> Exact:
    """Ridge's outer loss and hypergradient as one would write them with SciPy."""
    samples = len(design)
    hessian = design.T @ design / samples
    hessian[np.diag_indices_from(hessian)] += np.exp(theta)
    factor = scipy.linalg.cho_factor(hessian, overwrite_a=True, check_finite=False)
    w = scipy.linalg.cho_solve(factor, response @ design / samples, check_finite=False)
    misfit = validation_design @ w - validation_response
    adjoint = scipy.linalg.cho_solve(
        factor, misfit @ validation_design / misfit.size, check_finite=False
    )
    return 0.5 * float(misfit @ misfit) / misfit.size, -np.exp(theta) * w * adjoint


@dataclass(frozen=True)
class Logistic:
    """P2: logistic regression with one penalty a feature.

    Inner mean log(1 + exp(Xw)) − y·Xw + ½ Σ exp(θ_j) w_j², outer the mean on validation
    data. Fields as in [`Ridge`][]; the labels are 0 and 1.
    """

    design: Float[Array, "m n"]
    response: Float[Array, " m"]
    validation_design: Float[Array, "k n"]
    validation_response: Float[Array, " k"]
    theta: Float[Array, " n"]

    @property
    def start(self) -> Float[Array, " n"]:
        """The zero vector, where every inner solve begins."""
        return jnp.zeros_like(self.theta)

    def objective(self, w: Array, theta: Array) -> Array:
        """The inner objective."""
        loss = _mean_logistic(self.design @ w, self.response)
        return loss + 0.5 * jnp.sum(jnp.exp(theta) * w**2)

    def outer_loss(self, w: Array, theta: Array) -> Array:
        """The validation loss."""
        del theta
        return _mean_logistic(self.validation_design @ w, self.validation_response)

    @cached_property
    def minimiser(self) -> np.ndarray:
        """The inner solution by Newton's method with Cholesky factorisations."""
        design, labels, theta = (np.asarray(a) for a in (self.design, self.response, self.theta))
        w = np.zeros(design.shape[1])
        for _ in range(100):
            probability = _sigmoid(design @ w)
            gradient = (probability - labels) @ design / len(design) + np.exp(theta) * w
            w = w - scipy.linalg.cho_solve(scipy.linalg.cho_factor(self._hessian(w)), gradient)
            if np.linalg.norm(gradient) < 1e-15 * np.sqrt(w.size):
                break
        return w

    def _hessian(self, w: np.ndarray) -> np.ndarray:
        design = np.asarray(self.design)
        probability = _sigmoid(design @ w)
        weight = probability * (1 - probability) / len(design)
        return (design.T * weight) @ design + np.diag(np.exp(np.asarray(self.theta)))

    @cached_property
    def spectrum(self) -> tuple[float, float]:
        """Least and largest eigenvalue of the inner Hessian at the solution."""
        values = scipy.linalg.eigvalsh(self._hessian(self.minimiser))
        return float(values[0]), float(values[-1])

    @cached_property
    def lipschitz(self) -> float:
        """Largest eigenvalue of the inner Hessian anywhere: it is largest at zero."""
        return float(scipy.linalg.eigvalsh(self._hessian(np.zeros(self.theta.size)))[-1])

    def exact(self) -> Exact:
        """Outer loss and hypergradient by Newton's method and a Cholesky factorisation."""
        w = self.minimiser
        validation, labels = (
            np.asarray(self.validation_design),
            np.asarray(self.validation_response),
        )
        scores = validation @ w
        loss = float(np.mean(np.logaddexp(0.0, scores) - labels * scores))
        outer_gradient = (_sigmoid(scores) - labels) @ validation / len(validation)
        factor = scipy.linalg.cho_factor(self._hessian(w))
        adjoint = scipy.linalg.cho_solve(factor, outer_gradient)
        return loss, -np.exp(np.asarray(self.theta)) * w * adjoint


def _mean_logistic(scores: Array, labels: Array) -> Array:
    return jnp.mean(jax.nn.softplus(scores) - labels * scores)


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-scores))


@dataclass(frozen=True)
class PoissonControl:
    """P3: sources of the Poisson equation fitted to an observed state.

    −Δu = Σ θ_ij φ_i(x) φ_j(y) on the unit square, zero Dirichlet, n×n interior points,
    five-point stencil; outer ½‖u − u_ref‖².

    - `bumps` (s, n): the s Gaussian bumps φ at the points of a line; s² parameters.
    - `reference` (n, n): the observed state.
    - `theta` (s, s): the parameters at which everything is measured.
    """

    bumps: Float[Array, "s n"]
    reference: Float[Array, "n n"]
    theta: Float[Array, "s s"]

    @property
    def start(self) -> Float[Array, "n n"]:
        """The zero state, where every inner solve begins."""
        return jnp.zeros_like(self.reference)

    def operator(self, theta: Array) -> "Stencil":
        """The negative Laplacian; the same for every theta."""
        del theta
        return Stencil(self.reference.shape[0])

    def rhs(self, theta: Array) -> Array:
        """The source, (n, n)."""
        return self.bumps.T @ theta @ self.bumps

    def objective(self, u: Array, theta: Array) -> Array:
        """The energy, whose minimiser solves the equation."""
        return 0.5 * jnp.vdot(u, self.operator(theta).matvec(u)) - jnp.vdot(self.rhs(theta), u)

    @property
    def lipschitz(self) -> float:
        """Largest eigenvalue of the operator."""
        points = self.reference.shape[0]
        return 8.0 * (points + 1) ** 2 * math.sin(0.5 * math.pi * points / (points + 1)) ** 2

    def outer_loss(self, u: Array, theta: Array) -> Array:
        """Half the squared distance to the observed state."""
        del theta
        return 0.5 * jnp.sum((u - self.reference) ** 2)

    def exact(self) -> Exact:
        """Outer loss and hypergradient by sparse LU."""
        stencil = self.operator(self.theta)
        state = stencil.solve_directly(np.asarray(self.rhs(self.theta)))
        misfit = state - np.asarray(self.reference)
        bumps = np.asarray(self.bumps)
        return 0.5 * float(np.sum(misfit**2)), bumps @ stencil.solve_directly(misfit) @ bumps.T


@dataclass(frozen=True)
class Stencil:
    """The negative Laplacian on the interior points of the unit interval, square or cube.

    Second differences along every axis, zero Dirichlet; without a matrix.

    - `points`: interior points a side.
    - `dimensions`: how many axes.
    - `dtype`: of the unknowns.
    """

    points: int
    dimensions: int = 2
    dtype: str = "float64"
    symmetric = True
    positive_definite = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the unknown."""
        return (self.points,) * self.dimensions

    def matvec(self, u: Array) -> Array:
        """Apply it."""
        # A fifth faster here than slices of one padded array, and its own transpose in form: so no
        # library wins by how it transposes.
        neighbours = sum(
            _shifted(u, along, ahead) for along in range(self.dimensions) for ahead in (True, False)
        )
        return (2.0 * self.dimensions * u - neighbours) * (self.points + 1.0) ** 2

    def rmatvec(self, u: Array) -> Array:
        """Apply its transpose, which is itself."""
        return self.matvec(u)

    def diagonal(self) -> Array:
        """Its constant diagonal."""
        entry = 2.0 * self.dimensions * (self.points + 1.0) ** 2
        return jnp.full(self.shape, entry, self.dtype)

    def matrix(self) -> scipy.sparse.csc_matrix:
        """As a SciPy matrix in float64, rows in the order of `u.reshape(-1)`."""
        ahead = scipy.sparse.eye_array(self.points, k=1)
        line = 2.0 * scipy.sparse.eye_array(self.points) - ahead - ahead.T
        total = line
        for _ in range(self.dimensions - 1):
            total = scipy.sparse.kronsum(line, total)
        return scipy.sparse.csc_matrix(total * (self.points + 1.0) ** 2)

    def solve_directly(self, rhs: np.ndarray) -> np.ndarray:
        """The solution by sparse LU in float64, refined once."""
        matrix = self.matrix()
        factor = scipy.sparse.linalg.splu(matrix)
        target = rhs.reshape(-1).astype(np.float64)
        u = factor.solve(target)
        u += factor.solve(target - matrix @ u)
        return u.reshape(rhs.shape)


def _shifted(u: Array, axis: int, ahead: bool) -> Array:
    """Every neighbour along an axis; zero beyond the edge."""
    part = slice(1, None) if ahead else slice(None, -1)
    index = tuple(part if place == axis else slice(None) for place in range(u.ndim))
    widths = [(0, 0)] * u.ndim
    widths[axis] = (0, 1) if ahead else (1, 0)
    return jnp.pad(u[index], widths)


def ridge(samples: int = 2000, features: int = 500, seed: int = 0) -> Ridge:
    """P1: half as many validation samples as training samples, condition number 77."""
    random = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 0.123, features)
    weights = random.standard_normal(features)

    def data(count: int) -> tuple[np.ndarray, np.ndarray]:
        design = random.standard_normal((count, features)) * scales
        return design, design @ weights + 0.5 * random.standard_normal(count)

    train, validation = data(samples), data(samples // 2)
    theta = np.log(0.01) + 0.3 * random.standard_normal(features)
    return Ridge(*(jnp.asarray(a) for a in (*train, *validation, theta)))


def logistic(samples: int = 5000, features: int = 200, seed: int = 0) -> Logistic:
    """P2: half as many validation samples as training samples, condition number 35."""
    random = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 0.112, features)
    weights = 0.3 * random.standard_normal(features)

    def data(count: int) -> tuple[np.ndarray, np.ndarray]:
        design = random.standard_normal((count, features)) * scales
        noisy = design @ weights + 0.5 * random.standard_normal(count)
        return design, (noisy > 0).astype(float)

    train, validation = data(samples), data(samples // 2)
    theta = np.log(0.005) + 0.3 * random.standard_normal(features)
    return Logistic(*(jnp.asarray(a) for a in (*train, *validation, theta)))


def poisson_control(points: int = 64, sources: int = 10, seed: int = 0) -> PoissonControl:
    """P3: `sources`² parameters; the observed state belongs to other parameters."""
    random = np.random.default_rng(seed)
    x = np.arange(1, points + 1) / (points + 1)
    centres = np.arange(1, sources + 1) / (sources + 1)
    bumps = np.exp(-0.5 * ((x - centres[:, None]) * (sources + 1)) ** 2)
    truth, theta = random.standard_normal((2, sources, sources))
    blank = PoissonControl(jnp.asarray(bumps), jnp.zeros((points, points)), jnp.asarray(theta))
    reference = Stencil(points).solve_directly(np.asarray(blank.rhs(jnp.asarray(truth))))
    return PoissonControl(blank.bumps, jnp.asarray(reference), blank.theta)
