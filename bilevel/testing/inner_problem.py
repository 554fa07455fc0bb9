"""Conformance of an inner problem: does it keep what it claims."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.checking import check_like
from bilevel.dependence import reads
from bilevel.inner_solve import as_vector
from bilevel.operator import LinearOperator
from bilevel.problem import InnerProblem, as_inner_problem
from bilevel.testing.conformance import Checklist, flat_norm, wide
from bilevel.testing.sample import all_nan, inexact, random_like, stack, with_inexact
from bilevel.testing.taylor import taylor_test
from bilevel.testing.user_code import fail_by, require_order
from bilevel.theta import evaluated

KRYLOV = 12
"""Dimension of the subspace in which positive definiteness is put to the test."""

UNITS = 64
"""Entries of a diagonal that are compared at most."""


def check_inner_problem(
    problem: object, theta: PyTree, x0: PyTree, *, solution: PyTree | None = None
) -> tuple[str, ...]:
    """Check an inner problem of your own.

    The residual here is the one that solvers see, `problem.at(theta).residual`, which points
    downhill whatever the sign of the problem's own; docs/custom.md explains the signs.

    In order, as far as each applies:

    1. *residual like x*: structure, shapes and dtypes of x0.
    2. *residual finite*: at x0.
    3. *same under jit*: tracing changes nothing.
    4. *same under vmap*: a batch gives what its samples give.
    5. *depends on theta*: the residual or the objective reads θ, where it has floats.
    6. *NaN shows*: where the residual depends on θ, a NaN in θ reaches it.
    7. *derivative in x*, 8. *derivative in theta*: the residual's derivatives pass
       [`taylor_test`][], and reverse mode is the transpose of forward mode.
    9. *objective*: a real scalar, of which the residual is the negative gradient.
    10. *mapping*: the residual is the mapping minus the identity.
    11. *operator linear*, 12. *adjoint*: ⟨A u, v⟩ = ⟨u, Aᴴ v⟩ for a given `rmatvec`,
        13. *diagonal*, 14. *matrix*: each is that of `matvec`, and 15. *right-hand side*: the
        residual is b - A x.
    16. *symmetric*: ⟨N u, v⟩ = ⟨u, N v⟩ where claimed.
    17. *positive definite*: not refuted, where claimed, in a Krylov subspace. A minimisation
        claims it at its minimiser only: give `solution`.

    **Arguments:**

    - `problem`: an inner problem, or any object with `residual(x, theta)`.
    - `theta`, `x0`: a typical θ, and an x of the right structure, shapes and dtypes where
        the problem is smooth.
    - `solution`: x*(θ) where it is known; derivatives and definiteness are then checked there.

    **Returns:** the names of the properties that were checked.

    **Raises:** `ConformanceError` for the first property that does not hold; what `bl.solve`
    raises for something that is no problem.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> from bilevel.testing import check_inner_problem
    >>> problem = bl.FixedPoint(lambda x, theta: theta * jnp.cos(x))
    >>> "derivative in x" in check_inner_problem(problem, 0.5, 1.0)
    True
    """
    for name in ("residual", "objective", "function", "mapping"):
        function: Any = getattr(problem, name, None)
        if callable(function) and not isinstance(problem, type):
            require_order(f"{type(problem).__name__}.{name}", function, ("x", "theta"))
    problem = as_inner_problem(problem)
    theta = jax.tree.map(jnp.asarray, theta)
    x0 = as_vector("x0", x0)
    bound = problem.at(theta)
    checklist = Checklist(bound.name)
    _residual(checklist, problem, theta, x0)
    where = x0 if solution is None else as_vector("solution", solution)
    _derivatives(checklist, problem, theta, where)
    if bound.objective is not None:
        _objective(checklist, bound, bound.objective, where)
    if bound.mapping is not None:
        _equal(
            checklist,
            "mapping",
            vector.subtract(bound.mapping(where), where),
            bound.residual(where),
            "Let residual return mapping(x) - x.",
        )
    if bound.operator is not None:
        check_operator(checklist, bound.operator, where)
        _equal(
            checklist,
            "right-hand side",
            vector.subtract(bound.rhs, bound.operator.matvec(where)),
            bound.residual(where),
            "Let the residual be rhs - operator.matvec(x).",
        )
    implied = bound.objective is not None and solution is None
    check_definiteness(checklist, bound, bound.linearize(where), where, implied=implied)
    return tuple(checklist.held)


def _residual(checklist: Checklist, problem: InnerProblem, theta: PyTree, x0: PyTree) -> None:
    def residual(theta: Any, x: Any) -> Any:
        return problem.at(theta).residual(x)

    name = "residual like x"
    outcome: Any = None
    try:
        outcome = jax.eval_shape(residual, theta, x0)
    except Exception as error:  # noqa: BLE001
        fail_by(checklist, name, "residual", error, _exchanged(residual, theta, x0))
    try:
        check_like("the residual", outcome, x0)
    except TypeError as error:
        got, _, advice = str(error).partition(". ")
        if outcome is None:
            got, advice = "None", "Write return ... at the end of residual."
        advice = _exchanged(residual, theta, x0) or advice
        checklist.fail(name, "a residual like x0", f"this: {got}", advice)
    checklist.hold(name)
    value = residual(theta, x0)
    finite = np.isfinite(flat_norm(value))
    advice = "Check the data, theta and x0 for NaN, and the formula for 0/0 or an overflow."
    checklist.require("residual finite", finite, "finite numbers", value, advice)
    checklist.hold("residual finite")
    advice = "Compute with jax.numpy, and keep no state between calls."
    _equal(checklist, "same under jit", value, jax.jit(residual)(theta, x0), advice)
    other = vector.add(x0, random_like(x0, seed=1))
    batch = jax.vmap(residual, in_axes=(None, 0))(theta, stack([x0, other]))
    advice = "Index from the end (x[..., i]) and reduce over named axes, so that a batch can pass."
    loop = stack([value, residual(theta, other)])
    _equal(checklist, "same under vmap", loop, batch, advice)
    _reads_theta(checklist, problem, theta, x0)
    if depends_on_theta(problem, theta, x0):
        shown = not np.isfinite(flat_norm(residual(all_nan(theta), x0)))
        advice = "Do not replace NaN (jnp.nan_to_num, jnp.where): a failure must stay visible."
        checklist.require("NaN shows", shown, "a non-finite residual", "a finite one", advice)
        checklist.hold("NaN shows")


def _exchanged(residual: Callable[[Any, Any], Any], theta: PyTree, x0: PyTree) -> str:
    """Advice where the residual is like x with θ and x in each other's place."""
    try:
        check_like("the residual", jax.eval_shape(residual, x0, theta), theta)
    except Exception:  # noqa: BLE001
        return ""
    return (
        "With theta and x0 exchanged it would be: the arguments are check_inner_problem(problem, "
        "theta, x0), and residual(x, theta)."
    )


def _reads_theta(checklist: Checklist, problem: InnerProblem, theta: PyTree, x0: PyTree) -> None:
    moving = inexact(theta)
    if not jax.tree.leaves(moving):
        return
    name = "depends on theta"
    checklist.require(
        name,
        reads(lambda moving: evaluated(problem, with_inexact(theta, moving), x0), moving),
        "a residual or an objective that reads theta",
        "none that does, so that every derivative in theta is zero",
        "Use the theta that the functions are given, not a variable outside that holds the same; "
        "give theta=None for a problem without.",
    )
    checklist.hold(name)


def depends_on_theta(problem: InnerProblem, theta: PyTree, x0: PyTree) -> bool:
    """Whether the residual changes with the inexact leaves of θ, to first order."""
    moving = inexact(theta)
    if not jax.tree.leaves(moving):
        return False

    # At zero many a residual does not depend on θ: a little aside it does.
    x = vector.add_scaled(x0, 0.1, random_like(x0, seed=9))

    def residual(moving: Any) -> Any:
        return problem.at(with_inexact(theta, moving)).residual(x)

    moved = vector.add(moving, vector.scale(1e-2, random_like(moving, seed=7)))
    return flat_norm(vector.subtract(residual(moved), residual(moving))) > 0


def _derivatives(checklist: Checklist, problem: InnerProblem, theta: PyTree, x: PyTree) -> None:
    def of_x(x: Any) -> Any:
        return problem.at(theta).residual(x)

    def of_theta(moving: Any) -> Any:
        return problem.at(with_inexact(theta, moving)).residual(x)

    for name, function, point in (
        ("derivative in x", of_x, x),
        ("derivative in theta", of_theta, inexact(theta)),
    ):
        if not jax.tree.leaves(point):
            continue
        result = taylor_test(jax.jit(function), point)
        checklist.require(
            name,
            # Single precision leaves few steps between curvature and rounding.
            result.slope >= (1.9 if vector.epsilon(point) < 1e-10 else 1.5),
            "a Taylor remainder of second order",
            f"one of order {result.slope:.2f} ({_numbers(result.remainders)})",
            "Look for custom derivative rules, jax.lax.stop_gradient, rounding or casts to "
            "integers, and kinks at this point.",
        )
        _duality(checklist, name, function, point)
        checklist.hold(name)


def _duality(
    checklist: Checklist, name: str, function: Callable[[Any], Any], point: PyTree
) -> None:
    """⟨u, J v⟩ = ⟨Jᵀ u, v⟩, in the convention of JAX's transpose."""
    direction = random_like(point, seed=2)
    _, forward = jax.jvp(function, (point,), (direction,))
    value, pull = jax.vjp(function, point)
    cotangent = random_like(value, seed=3)
    (back,) = pull(cotangent)
    left, right = bilinear(cotangent, forward), bilinear(back, direction)
    scale = flat_norm(cotangent) * flat_norm(forward) + flat_norm(back) * flat_norm(direction)
    checklist.require(
        name,
        abs(left - right) <= rounding(point) * scale,
        f"reverse mode to be the transpose of forward mode, ⟨u, Jv⟩ = {number(left)}",
        f"⟨Jᵀu, v⟩ = {number(right)}",
        "Look for custom derivative rules that do not belong together.",
    )


def _objective(
    checklist: Checklist, bound: BoundProblem, objective: Callable[[Any], Any], x: PyTree
) -> None:
    name = "objective"
    gradient = vector.conjugate(vector.negative(bound.residual(x)))
    result = taylor_test(jax.jit(objective), x, derivative=gradient)
    checklist.require(
        name,
        result.slope >= (1.9 if vector.epsilon(x) < 1e-10 else 1.5),
        "the residual to be minus the objective's gradient, with a Taylor remainder of order 2",
        f"one of order {result.slope:.2f} ({_numbers(result.remainders)})",
        "Let residual be the gradient of the very objective.",
    )
    checklist.hold(name)


def check_operator(checklist: Checklist, operator: LinearOperator, like: PyTree) -> None:
    """Linearity, adjoint, diagonal and matrix of an operator."""
    u, v = random_like(like, seed=4), random_like(like, seed=5)
    factor = -1.7
    together = operator.matvec(vector.add_scaled(u, factor, v))
    apart = vector.add_scaled(operator.matvec(u), factor, operator.matvec(v))
    advice = "Let matvec be A v alone: no constant term, no branch on values."
    _equal(checklist, "operator linear", apart, together, advice)
    if operator.rmatvec is not None:
        image, back = operator.matvec(u), operator.rmatvec(v)
        left, right = sesquilinear(v, image), sesquilinear(back, u)
        scale = flat_norm(v) * flat_norm(image) + flat_norm(back) * flat_norm(u)
        checklist.require(
            "adjoint",
            abs(left - right) <= rounding(like) * scale,
            f"⟨v, A u⟩ = ⟨Aᴴ v, u⟩, that is {number(left)}",
            number(right),
            "Let rmatvec be the conjugate transpose of matvec, or leave it out: it is then found "
            "by transposing matvec.",
        )
        checklist.hold("adjoint")
    if operator.diagonal is not None:
        advice = "Let diagonal be that of matvec, like x: one entry for each unknown."
        checklist.require_like("diagonal", like, operator.diagonal, advice)
        expected, got = _diagonals(operator, like)
        _equal(checklist, "diagonal", expected, got, advice)
    if operator.matrix is not None:
        advice = "Let matrix be the matrix of matvec."
        _equal(checklist, "matrix", operator.matvec(u), operator.matrix @ u, advice)


def _diagonals(operator: LinearOperator, like: PyTree) -> tuple[Any, Any]:
    """Entries eᵢᵀ A eᵢ, and those that the operator declares."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    entries = np.random.default_rng(6).permutation(flat.size)[:UNITS]

    def entry(index: Any) -> Any:
        unit = jnp.zeros_like(flat).at[index].set(1.0)
        return jax.flatten_util.ravel_pytree(operator.matvec(unravel(unit)))[0][index]

    declared = jax.flatten_util.ravel_pytree(operator.diagonal)[0][entries]
    return jax.lax.map(entry, jnp.asarray(entries)), declared


def check_definiteness(
    checklist: Checklist, bound: BoundProblem, operator: LinearOperator, x: PyTree, *, implied: bool
) -> None:
    """Symmetry and positive definiteness, where they are claimed."""
    # A Hessian is linear over the reals only; so is its inner product.
    product = bound.inner_product
    if bound.symmetric:
        u, v = random_like(x, seed=4), random_like(x, seed=5)
        image, other = operator.matvec(u), operator.matvec(v)
        left, right = complex(product(image, v)), complex(product(u, other))
        scale = flat_norm(image) * flat_norm(v) + flat_norm(other) * flat_norm(u)
        checklist.require(
            "symmetric",
            abs(left - right) <= rounding(x) * scale,
            f"⟨N u, v⟩ = ⟨u, N v⟩, that is {number(left)}",
            number(right),
            "Do not declare symmetric=True (nor positive_definite=True), and use GMRES or "
            "BiCGStab; or correct the operator.",
        )
        checklist.hold("symmetric")
    if bound.positive_definite and not implied:
        smallest, largest = _ritz_values(operator, x, product)
        checklist.require(
            "positive definite",
            smallest > -rounding(x) * max(abs(largest), abs(smallest)),
            "⟨v, N v⟩ > 0 for all v",
            f"a direction with ⟨v, N v⟩ / ⟨v, v⟩ = {smallest:.6g}",
            "Do not declare positive_definite=True, and use MINRES, GMRES or a direct solver; at a "
            "minimiser, check that it is one.",
        )
        checklist.hold("positive definite")


def _ritz_values(operator: LinearOperator, x: PyTree, product: Any) -> tuple[float, float]:
    """Smallest and largest eigenvalue in a Krylov subspace: within those of the operator."""
    basis: list[Any] = []
    images: list[Any] = []
    v = random_like(x, seed=8)
    for _ in range(min(KRYLOV, 2 * vector.size(x))):
        before = flat_norm(v)
        for _ in range(2):  # once is not orthogonal to rounding
            for b in basis:
                v = _without(v, b, product(b, v))
        length = flat_norm(v)
        if length <= 1e3 * vector.epsilon(x) * before or not np.isfinite(length):
            break
        basis.append(vector.scale(1.0 / length, v))
        images.append(operator.matvec(basis[-1]))
        v = images[-1]
    small = np.array([[complex(product(a, b)) for b in images] for a in basis])
    values = np.linalg.eigvalsh(0.5 * (small + small.conj().T))
    return float(values[0]), float(values[-1])


def _equal(checklist: Checklist, name: str, expected: PyTree, got: PyTree, advice: str) -> None:
    checklist.require_like(name, expected, got, advice)
    error = flat_norm(
        [np.asarray(b, wide(b)) - np.asarray(a, wide(a)) for a, b in _pairs(expected, got)]
    )
    allowed = rounding(expected) * max(flat_norm(expected), flat_norm(got))
    checklist.require(
        name,
        error <= allowed,
        f"equal values to {allowed:.1e}",
        f"a difference of {error:.1e}",
        advice,
    )
    checklist.hold(name)


def _without(v: PyTree, b: PyTree, share: complex) -> PyTree:
    return jax.tree.map(lambda p, q: p - (share * q).astype(p.dtype), v, b)


def _pairs(first: PyTree, second: PyTree) -> Any:
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


def rounding(x: PyTree) -> float:
    """A relative error that may be due to rounding alone."""
    return 1e3 * vector.epsilon(eqx.filter(x, eqx.is_inexact_array))


def bilinear(x: PyTree, y: PyTree) -> complex:
    """Σ x y without a conjugate, real part: the pairing of JAX's transpose."""
    total = sum(
        complex(np.sum(np.asarray(a, wide(a)) * np.asarray(b, wide(b)))) for a, b in _pairs(x, y)
    )
    return complex(np.real(total))


def sesquilinear(x: PyTree, y: PyTree) -> complex:
    """Σ x̄ y."""
    return sum(
        (complex(np.vdot(np.asarray(a, wide(a)), np.asarray(b, wide(b)))) for a, b in _pairs(x, y)),
        0j,
    )


def number(value: complex) -> str:
    """Six digits, the imaginary part only where there is one."""
    return f"{value.real:.6g}" if value.imag == 0 else f"{value:.6g}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.0e}" for value in values[:6])
