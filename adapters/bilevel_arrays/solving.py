"""`bilevel_arrays.solve` and `bilevel_arrays.hypergradient`: inner problems on any arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.estimator.base import Estimator
from bilevel.evaluation import Cost, Hypergradient
from bilevel.signature import brief, check_callable
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel_arrays.adjoint import Adjoint, adjoint_of, default_like, trusted
from bilevel_arrays.choice import default_solver, prepared, stepping_of
from bilevel_arrays.guard import Guarded
from bilevel_arrays.library import load
from bilevel_arrays.loop import run
from bilevel_arrays.problem import ArrayProblem
from bilevel_arrays.pullback import by_torch, like_theta, no_derivative, requires
from bilevel_arrays.space import Space, compat


def solve(
    problem: ArrayProblem,
    theta: PyTree,
    x0: PyTree,
    *,
    solver: InnerSolver | None = None,
    estimator: Estimator | None = None,
    budget: Budget | None = None,
    adjoint_budget: Budget | None = None,
    adjoint_guess: PyTree | None = None,
    history: int = 0,
) -> Solution:
    """Solve an inner problem on the arrays it is written for, eagerly.

    The loop, the statuses and the numbers are those of `bl.solve`. With tensors of PyTorch of
    which one in `theta` requires grad, the value joins autograd, and its backward pass is an
    adjoint solve to `adjoint_budget`.

    **Arguments:**

    - `problem`: one of this package: `Minimization`, `RootFinding`, `FixedPoint`, `LinearSystem`.
    - `theta`: any pytree, of arrays of the same library and device as `x0`, and numbers.
    - `x0`: the start, a pytree of float32 or float64 arrays.
    - `solver`: `bl.GradientDescent`, `FixedPointIteration`, `Anderson`, `Richardson`, `Jacobi`,
        `ConjugateGradient`, `BiCGStab` or `GMRES`. By default conjugate gradients or GMRES for a
        linear system and Anderson for a fixed point.
    - `estimator`: `bl.Implicit` or `bl.Neumann`; by default `Implicit`, with the solver of a linear
        system for its adjoint, too.
    - `budget`, `adjoint_budget`, `adjoint_guess`, `history`: as for `bl.solve`.

    **Returns:** a `bl.Solution`; its `value` is like `x0`, its numbers are NumPy's.

    **Raises:** `TypeError` for arrays of two kinds and what does not fit, `ValueError` for a
    function that writes into its argument, for a start that requires grad and for a problem that
    captured a tensor that does, `IncompatibleError` for a solver or an estimator that needs
    JAX's arrays, or that does not suit the problem.

    >>> import numpy as np, bilevel as bl, bilevel_arrays as ba
    >>> problem = ba.LinearSystem(np.diag([1.0, 2.0]), np.ones(2))
    >>> solution = ba.solve(problem, None, np.zeros(2), solver=bl.BiCGStab())
    >>> solution.value, solution.diagnosis.split(":")[0]
    (array([1. , 0.5]), 'CONVERGED')
    """
    setting = _arranged(
        problem, theta, x0, solver, estimator, budget, adjoint_budget, adjoint_guess, history
    )
    if setting.space.is_torch:
        torch: Any = load("torch")
        if torch.is_grad_enabled():
            from bilevel_arrays.torch_solution import attached  # noqa: PLC0415, needs torch

            return attached(setting)
    return setting.primal()


def hypergradient(
    outer_loss: Callable[[Any, Any], Any],
    problem: ArrayProblem,
    theta: PyTree,
    x0: PyTree,
    *,
    outer_gradient: Callable[[Any, Any], Any] | None = None,
    solver: InnerSolver | None = None,
    estimator: Estimator | None = None,
    budget: Budget | None = None,
    adjoint_budget: Budget | None = None,
    adjoint_guess: PyTree | None = None,
    history: int = 0,
) -> Hypergradient:
    """The hypergradient of L(θ) = outer_loss(x(θ), θ) on any arrays, with both solves.

    **Arguments:**

    - `outer_loss`: outer_loss(x, theta) -> real scalar.
    - `outer_gradient`: outer_gradient(x, theta) -> (like x, like theta), its derivatives; torch's
        autograd finds them for PyTorch.
    - the others: see `solve`.

    **Returns:** a `bl.Hypergradient` whose `gradient` is like `theta`, NaN where a solve failed,
    `None` at leaves that are no floating-point arrays. Its `error` is `None`: the truncation error
    is estimated on JAX's side alone.

    **Raises:** as `solve`; `ValueError` where neither the problem nor `outer_loss` reads theta.

    >>> import numpy as np, bilevel as bl, bilevel_arrays as ba
    >>> problem = ba.LinearSystem(
    ...     np.diag([1.0, 2.0]), lambda theta: theta, vjp=lambda x, theta, v: v
    ... )
    >>> result = ba.hypergradient(
    ...     lambda x, theta: x.sum(),
    ...     problem,
    ...     np.ones(2),
    ...     np.zeros(2),
    ...     outer_gradient=lambda x, theta: (np.ones(2), np.zeros(2)),
    ... )
    >>> float(result.value), result.gradient
    (1.5, array([1. , 0.5]))
    """
    check_callable("hypergradient", "outer_loss", outer_loss, ("x", "theta"))
    setting = _arranged(
        problem, theta, x0, solver, estimator, budget, adjoint_budget, adjoint_guess, history
    )
    space, primal = setting.space, setting.primal()
    x = primal.value
    with setting.quiet():
        value = Guarded("hypergradient", "outer_loss(x, theta)", outer_loss, space)(x, theta)
    if tuple(getattr(value, "shape", ())) != ():
        msg = (
            "outer_loss(x, theta) must return a real scalar, got shape "
            f"{tuple(value.shape)}. Take the mean or the sum."
        )
        raise TypeError(msg)
    _check_value(value, space)
    of_x, of_theta = _outer_derivatives(setting, outer_loss, outer_gradient, x)
    adjoint, indirect = setting.pulled(primal, of_x)
    if not any(
        leaf is not None
        for part in (of_theta, indirect)
        for leaf in jax.tree.leaves(part, is_leaf=_is_none)
    ):
        msg = (
            "nothing reads theta: neither the problem nor outer_loss depends on it, and its "
            "gradient would be zero. Use the theta that the functions are given, not a variable "
            "outside."
        )
        raise ValueError(msg)
    total = jax.tree.map(_sum, of_theta, indirect, theta, is_leaf=_is_none)
    none = np.int32(0)
    cost: Any = Cost(
        primal.inner_iterations,
        adjoint.iterations,
        primal.applications,
        adjoint.applications,
        none,  # pyright: ignore[reportArgumentType]
    )
    gradient = trusted(total, primal, adjoint)
    return Hypergradient(value, gradient, primal, adjoint, None, cost)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One inner solve on any arrays, with everything it needs.

    - `bound`: the problem at θ, evaluated once.
    """

    problem: ArrayProblem
    bound: BoundProblem
    theta: PyTree
    x0: PyTree
    space: Space
    solver: InnerSolver
    budget: Budget
    adjoint: Adjoint
    history: int

    def quiet(self) -> Any:
        """Without torch's graph: nothing of an iteration is kept."""
        return _quiet(self.space)

    def primal(self) -> Solution:
        """The solve itself."""
        space, x0 = self.space, self.x0
        with self.quiet():
            bound = prepared(self.bound, self.solver, x0, space)
            make = stepping_of(self.solver, space)
            return run(space, bound, make, x0, self.budget, history=self.history)

    def pulled(self, primal: Solution, cotangent: PyTree) -> tuple[Solution, PyTree]:
        """The adjoint solve for a cotangent of x, and λᵀ∂_θ r, like θ."""
        pullback = self.problem.pullback(self.theta, primal.value, self.space)
        with self.quiet():
            adjoint = self.adjoint.solve(self.bound, pullback, cotangent, self.space)
            return adjoint, pullback.of_theta(adjoint.value)


def _quiet(space: Space) -> Any:
    if space.is_torch:
        return load("torch").no_grad()
    return np.errstate(all="ignore")  # what became of it, the status says


def _arranged(
    problem: object,
    theta: PyTree,
    x0: PyTree,
    solver: InnerSolver | None,
    estimator: Estimator | None,
    budget: Budget | None,
    adjoint_budget: Budget | None,
    adjoint_guess: PyTree | None,
    history: int,
) -> Setting:
    """Check what the user gave, and fill in the defaults."""
    if not isinstance(problem, ArrayProblem):
        msg = (
            "problem must be one of bilevel_arrays: Minimization, RootFinding, FixedPoint or "
            f"LinearSystem, got {brief(problem)}. Problems of bilevel are for bl.solve."
        )
        raise TypeError(msg)
    for name, value, kind in (
        ("solver", solver, InnerSolver),
        ("budget", budget, Budget),
        ("adjoint_budget", adjoint_budget, Budget),
    ):
        if value is not None and not isinstance(value, kind):
            msg = f"{name} must be of bilevel, such as bl.{_EXAMPLES[name]}, got {brief(value)}."
            raise TypeError(msg)
    space = Space(x0)
    _check_detached("x0", x0, "the start")
    _check_theta(theta, space)
    if adjoint_guess is not None:
        space.require_like("adjoint_guess", adjoint_guess)
        _check_detached("adjoint_guess", adjoint_guess, "a guess")
    with _quiet(space):
        bound = problem.at(theta, space)
    chosen = solver is not None
    solver = default_solver(bound) if solver is None else solver
    stepping_of(solver, space)
    solver.check(bound)
    adjoint = adjoint_of(estimator, bound, solver, adjoint_budget, adjoint_guess, chosen=chosen)
    stepping_of(adjoint.solver, space)
    budget = solver.default_budget(default_like(space)) if budget is None else budget
    return Setting(problem, bound, theta, x0, space, solver, budget, adjoint, history)


_EXAMPLES = {
    "solver": "ConjugateGradient()",
    "budget": "Budget(iterations=100)",
    "adjoint_budget": "Budget(iterations=100)",
}


def _check_detached(name: str, start: PyTree, what: str) -> None:
    """**Raises:** `ValueError` for a leaf whose gradient would be asked for in vain."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(start):
        if requires(leaf):
            msg = (
                f"{name}{jax.tree_util.keystr(path)} requires grad, and {what} is not "
                "differentiated, so that its gradient would be missing without a word. Pass "
                ".detach()."
            )
            raise ValueError(msg)


def _check_theta(theta: PyTree, space: Space) -> None:
    """**Raises:** `TypeError` for arrays that do not go with those of x0."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        where = f"theta{jax.tree_util.keystr(path)}"
        if not compat.is_array_api_obj(leaf) or isinstance(leaf, np.generic):
            continue
        namespace = compat.array_namespace(leaf)
        if namespace is not space.xp:
            msg = (
                f"{where} is an array of {namespace.__name__} and x0 of {space.xp.__name__}: give "
                "both in one library."
            )
            raise TypeError(msg)
        if compat.device(leaf) != space.device:
            msg = f"{where} is on {compat.device(leaf)} and x0 on {space.device}. Move one of them."
            raise TypeError(msg)
        real = leaf.dtype
        if namespace.isdtype(leaf.dtype, "complex floating"):
            real = namespace.real(leaf[..., :0]).dtype
        if namespace.isdtype(real, "real floating") and real != space.dtype:
            msg = f"{where} is of {leaf.dtype} and x0 of {space.dtype}. Convert one of them."
            raise TypeError(msg)


def _outer_derivatives(
    setting: Setting,
    outer_loss: Callable[[Any, Any], Any],
    outer_gradient: Callable[[Any, Any], Any] | None,
    x: PyTree,
) -> tuple[PyTree, PyTree]:
    """∂ₓf, like x, and ∂_θf, like θ with `None` where there is none."""
    space, theta = setting.space, setting.theta
    if outer_gradient is not None:
        found = outer_gradient(x, theta)
        if not (isinstance(found, tuple) and len(found) == 2):
            msg = "outer_gradient(x, theta) must return a pair, like x and like theta."
            raise TypeError(msg)
        space.require_like("the first part of outer_gradient(x, theta)", found[0])
        return found[0], like_theta("outer_gradient(x, theta)", theta, found[1])
    if not space.is_torch:
        msg = no_derivative("outer_loss", space)
        msg = msg.replace("vjp=(x, theta, v)", "outer_gradient=(x, theta)")
        raise TypeError(msg.replace("the products of v with the", "its"))
    torch: Any = load("torch")
    pullback = by_torch("outer_loss(x, theta)", outer_loss, x, theta, space)
    one = torch.ones((), dtype=space.dtype, device=space.device)
    return pullback.of_x(one), pullback.of_theta(one)


def _check_value(value: Any, space: Space) -> None:
    """**Raises:** `TypeError` for a loss of another device or precision than x0."""
    dtype = getattr(value, "dtype", space.dtype)
    if dtype != space.dtype:
        msg = f"outer_loss(x, theta) is of {dtype} and x0 of {space.dtype}. Compute both in one."
        raise TypeError(msg)
    if compat.is_array_api_obj(value) and not isinstance(value, np.generic):
        device = compat.device(value)
        if device != space.device:
            msg = f"outer_loss(x, theta) is on {device} and x0 on {space.device}. Move one of them."
            raise TypeError(msg)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _sum(direct: Any, indirect: Any, leaf: Any) -> Any:
    """The two parts of a gradient; zero where nothing reads the leaf, `None` where none could."""
    if direct is None and indirect is None:
        floating = compat.is_array_api_obj(leaf) and compat.array_namespace(leaf).isdtype(
            leaf.dtype, "real floating"
        )
        return 0.0 * leaf if floating else None
    if direct is None or indirect is None:
        return indirect if direct is None else direct
    return direct + indirect
