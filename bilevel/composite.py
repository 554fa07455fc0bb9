"""Composite minimisation: a smooth objective plus a non-smooth term."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.closed import stopped
from bilevel.perturbation import along, instantiate, perturbed
from bilevel.problem import InnerProblem
from bilevel.proximal import Proximal, ProximalOperator, ProximalParts
from bilevel.solver.lanczos import extreme_eigenvalues

LANCZOS_STEPS = 10
"""Hessian products that the step of the residual is found from."""


class CompositeMinimization(InnerProblem):
    """x*(θ) = argmin over x of objective(x, θ) + h(x, θ), h convex with a proximal operator.

    Lasso, elastic net, non-negative least squares.  The equation is that of the proximal
    gradient step, F = prox(x - γ ∂ₓ objective, γ, θ) - x = 0, whose residual has the units of
    x; γ is one over the largest eigenvalue of the Hessian at the start, so that
    multiplying objective and h by a number changes nothing.

    **Derivative.**  It lives on the support (Bertrand et al. 2020): for a separable h, the
    linear systems are γH on the entries that the proximal operator lets move, and the
    identity elsewhere, hence symmetric: conjugate gradients take as many steps as the
    support needs.  The derivative does not exist where an entry is just about to enter or
    leave the support.

    **Arguments:**

    - `objective`: objective(x, theta) -> real scalar, smooth in x.
    - `proximal`: [`L1`][], [`ElasticNet`][], [`NonNegative`][], [`Box`][], an operator of your
        own ([`ProximalOperator`][]), or a function (z, step, theta) -> like z, of which
        no structure is known: its linear systems are solved as general ones.
    - `step`: γ in units of x over units of the gradient, where you know the largest
        eigenvalue L of the Hessian: 1/L. Measured at the start otherwise.

    **Raises:** `TypeError` for a proximal that is neither.

    >>> import jax, jax.numpy as jnp, bilevel as bl
    >>> lasso = bl.CompositeMinimization(
    ...     lambda x, theta: 0.5 * jnp.sum((x - jnp.array([3.0, 0.5])) ** 2),
    ...     bl.L1(lambda theta: theta),
    ... )
    >>> solution = bl.solve(lasso, 1.0, jnp.zeros(2))
    >>> [round(float(v), 4) for v in solution.value]
    [2.0, 0.0]
    >>> round(float(jax.grad(lambda t: bl.solve(lasso, t, jnp.zeros(2)).value.sum())(1.0)), 4)
    -1.0
    """

    objective: Callable[[Any, Any], Any]
    proximal: ProximalOperator
    step: Float[Array, ""] | float | None = None

    def __init__(
        self,
        objective: Callable[[Any, Any], Any],
        proximal: Any,
        step: Float[Array, ""] | float | None = None,
    ):
        if isinstance(proximal, type) or not callable(proximal):
            name = getattr(proximal, "__name__", repr(proximal))
            msg = (
                "CompositeMinimization: proximal must be a proximal operator such as L1(0.1) or a "
                f"function (z, step, theta) -> like z, got {name}."
            )
            raise TypeError(msg)
        self.objective = objective
        self.proximal = proximal if isinstance(proximal, ProximalOperator) else Proximal(proximal)
        self.step = step

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """The proximal gradient step."""
        return self.at(theta).residual(x)

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem at one θ, as solvers see it."""

        def mapping(x: PyTree) -> PyTree:
            parts = self.parts(theta, x)
            z = vector.add_scaled(x, -parts.step, parts.gradient(x))
            return parts.proximal(z, parts.step)

        return BoundProblem(
            name=type(self).__name__,
            theta=theta,
            residual=lambda x: vector.subtract(mapping(x), x),
            mapping=mapping,
            proximal=lambda x: self.parts(theta, x),
        )

    def anchored(self, theta: PyTree, x: PyTree) -> "CompositeMinimization":
        """The same problem, with γ measured once."""
        return CompositeMinimization(self.objective, self.proximal, self.parts(theta, x).step)

    def equation(self, x: PyTree) -> InnerProblem:
        """The symmetric form of the equation, where there is one."""
        is_complex = any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x))
        return SupportEquation(self) if self.proximal.separable and not is_complex else self

    def parts(self, theta: PyTree, x: PyTree) -> ProximalParts:
        """The parts of the objective at one θ; γ as given, or measured at x."""
        self.proximal.check(x)

        def smooth(x: PyTree, theta: PyTree) -> Array:
            value = jnp.asarray(self.objective(x, theta))
            if value.ndim != 0 or not jnp.issubdtype(value.dtype, jnp.floating):
                msg = (
                    "CompositeMinimization: objective(x, theta) must return a real scalar, got "
                    f"shape {value.shape} of {value.dtype}. Sum over the samples."
                )
                raise TypeError(msg)
            return value

        def gradient(x: PyTree, theta: PyTree) -> PyTree:
            return vector.conjugate(jax.grad(smooth)(x, theta))

        step = self.step
        if step is None:
            constant = stopped(theta)
            step = _natural_step(lambda x: gradient(x, constant), jax.lax.stop_gradient(x))
        return ProximalParts(
            objective=lambda x: smooth(x, theta),
            gradient=lambda x: gradient(x, theta),
            proximal=lambda z, step: self.proximal(z, jnp.asarray(step), theta),
            step=jnp.asarray(step, vector.real_dtype(x)),
        )


def _natural_step(gradient: Callable[[Any], Any], x: PyTree) -> Float[Array, ""]:
    """One over the largest eigenvalue of the Hessian at x in modulus; a constant.

    Where there is no curvature, a step as long as x, or of length 1 from zero.
    """
    slope, hessian = jax.linearize(gradient, x)
    found = extreme_eigenvalues(hessian, x, LANCZOS_STEPS)
    largest = jnp.maximum(jnp.abs(found.smallest), jnp.abs(found.upper))
    norm, reach = vector.norm(slope), vector.norm(x)
    distance = jnp.where(reach > 0, reach, 1.0) / jnp.where(norm > 0, norm, 1.0)
    flat = largest <= 0
    step = jnp.where(flat, distance, 1.0 / jnp.where(flat, 1.0, largest))
    return jax.lax.stop_gradient(step)


class SupportEquation(InnerProblem):
    """The equation of a composite minimisation in the form whose derivative is symmetric.

    With D = ∂prox, diagonal, and H = ∂²g, the natural residual r has N = I - D (I - γH), which is
    not symmetric.  Let S be the entries with D ≠ 0 and Z the others.  The same solution
    solves F = M r / γ with M = D⁻¹ on S and 1 on Z, minus γH from Z to S; at r = 0 its
    derivative is

        N = H + (1 - D)/(γD) on S,   1/γ on Z,   nothing in between,

    symmetric, and positive definite where the objective is strictly convex on S.  On S it
    is the Hessian of the objective and of the smooth part of h, whatever γ.
    """

    composite: CompositeMinimization

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """F = M r / γ."""
        return self.at(theta).residual(x)

    def at(self, theta: PyTree) -> BoundProblem:
        """The equation at one θ."""
        return BoundProblem(
            name=type(self.composite).__name__,
            residual=lambda x: self._symmetric(theta, x),
            symmetric=True,
            positive_definite=True,
        )

    def _symmetric(self, theta: PyTree, x: PyTree) -> PyTree:
        parts = self.composite.parts(theta, x)
        coupled = not self.composite.proximal.pinned
        # What these captured, θ first of all, must be an argument of the rule below.
        functions = (
            eqx.filter_closure_convert(parts.gradient, x),
            eqx.filter_closure_convert(parts.proximal, x, parts.step),
            jax.lax.stop_gradient(parts.step),
        )
        arrays, static = eqx.partition(functions, eqx.is_array)

        def plain(arrays: Any, x: PyTree) -> PyTree:
            gradient, proximal, step = eqx.combine(arrays, static)
            return _Support(gradient, proximal, step, x).residual(coupled=coupled)

        # The derivative in x is exact at the solution and symmetric everywhere; what it
        # leaves out is of the order of the residual, and a third derivative.
        @jax.custom_jvp
        def residual(arrays: Any, x: PyTree) -> PyTree:
            return plain(arrays, x)

        def rule(primals: Any, tangents: Any) -> Any:
            arrays, x = primals
            arrays_dot, x_dot = tangents
            tangent = vector.zeros_like(x)
            if perturbed(x_dot):
                gradient, proximal, step = eqx.combine(arrays, static)
                support = _Support(gradient, proximal, step, x)
                tangent = vector.negative(support.operator(instantiate(x_dot)))
            if perturbed(arrays_dot):
                change = along(lambda arrays: plain(arrays, x), arrays, arrays_dot)
                tangent = vector.add(tangent, change)
            return residual(arrays, x), tangent

        residual.defjvp(rule, symbolic_zeros=True)
        return residual(arrays, x)


class _Support:
    """The natural residual at x, and what of it lives on the support."""

    def __init__(self, gradient: Any, proximal: Any, step: Array, x: PyTree):
        slope, self.hessian = jax.linearize(gradient, x)
        z = vector.add_scaled(x, -step, slope)
        ones = jax.tree.map(jnp.ones_like, z)
        # Of a separable operator, the diagonal is all there is of the derivative.
        mapped, self.diagonal = jax.jvp(lambda z: proximal(z, step), (z,), (ones,))
        self.natural = vector.subtract(mapped, x)
        self.step = step
        self.moves = jax.tree.map(lambda d: d != 0, self.diagonal)

    def residual(self, *, coupled: bool) -> PyTree:
        """F; `coupled` where entries off the support move with θ and take others along."""
        scaled = self._on_support(lambda d, r: r / d, self.natural, self.natural)
        scaled = vector.scale(1.0 / self.step, scaled)
        if not coupled:
            return scaled
        outside = self._choose(vector.zeros_like(scaled), self.natural)
        return self._choose(vector.subtract(scaled, self.hessian(outside)), scaled)

    def operator(self, v: PyTree) -> PyTree:
        """N v."""
        curved = self.hessian(self._choose(v, vector.zeros_like(v)))
        damped = self._on_support(lambda d, leaf: (1 - d) / d * leaf, v, v)
        damped = vector.scale(1.0 / self.step, damped)
        return self._choose(vector.add(curved, damped), damped)

    def _choose(self, on_support: PyTree, elsewhere: PyTree) -> PyTree:
        return jax.tree.map(jnp.where, self.moves, on_support, elsewhere)

    def _on_support(self, function: Any, v: PyTree, otherwise: PyTree) -> PyTree:
        """function(D, v) on the support, something else outside."""
        return jax.tree.map(
            lambda moves, d, leaf, other: jnp.where(
                moves, function(jnp.where(moves, d, 1), leaf), other
            ),
            self.moves,
            self.diagonal,
            v,
            otherwise,
        )
