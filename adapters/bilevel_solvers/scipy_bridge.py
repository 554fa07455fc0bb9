"""scipy_objective: a hypergradient as a function that `scipy.optimize.minimize` takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from numpy.typing import ArrayLike, NDArray

import bilevel as bl

Evaluate = Callable[[PyTree, PyTree, PyTree | None, bl.Fidelity | None], bl.Hypergradient]
"""(theta, x0, adjoint_guess, fidelity) -> what `bl.hypergradient` returns."""

MOST_REPEATS = 60
"""How often one call goes on refining until the controller accepts its hypergradient."""


class Evaluation(NamedTuple):
    """What one call found.

    - `theta`: the point, as a flat vector.
    - `value`: the outer loss there.
    - `gradient_norm`: Euclidean norm of its gradient.
    - `error`: estimated truncation error of the gradient, absolute; NaN where none was
        estimated.
    - `primal_iterations`, `adjoint_iterations`: of this call, repetitions included.
    """

    theta: NDArray[np.float64]
    value: float
    gradient_norm: float
    error: float
    primal_iterations: int
    adjoint_iterations: int


class NonFiniteEvaluationError(ArithmeticError):
    """A value or gradient was not finite: an inner or an adjoint solve failed.

    - `result`: the [`bilevel.hypergradient`][] that says why; `None` where theta itself was
        not finite.
    - `theta`: where.
    """

    def __init__(self, message: str, theta: PyTree, result: bl.Hypergradient | None):
        super().__init__(message)
        self.theta = theta
        self.result = result


class ScipyObjective:
    """Value and gradient on flat vectors, with a memory: what [`scipy_objective`][] returns.

    SciPy's optimizers take one vector of float64 and know nothing of budgets.  Each call
    here puts the vector into the shape and dtypes of `theta0`, evaluates, starts both
    solves where those of the last call ended, and writes down what came out.

    - `budget`, `adjoint_budget`: set them between calls; arrays all through, so nothing
        compiles anew.
    - `controller`, `state`: of progressive refinement, where one was given.
    - `start`: `theta0` as a flat vector.
    - `history`: an [`Evaluation`][] for each call.
    - `result`: what the last call's `bl.hypergradient` returned; `None` before the first.

    **Arguments:**

    - `evaluate`: (theta, x0, adjoint_guess, fidelity) -> a `bl.Hypergradient`, for those who
        need more than one problem in it: several folds under `jax.vmap`, say.
    - the others: see [`scipy_objective`][].
    """

    def __init__(
        self,
        evaluate: Evaluate,
        theta0: PyTree,
        x0: PyTree,
        *,
        budget: bl.Budget | None = None,
        adjoint_budget: bl.Budget | None = None,
        controller: bl.Controller[Any] | None = None,
        warm_start: bool = True,
        warm_adjoint: bool = True,
    ):
        if controller is not None and not (budget is None and adjoint_budget is None):
            msg = (
                "scipy_objective: budgets and a controller were both given, but the controller "
                "says what the budgets are. Give one of the two."
            )
            raise ValueError(msg)
        if adjoint_budget is not None and budget is None:
            msg = (
                "scipy_objective: adjoint_budget needs a budget beside it, got budget=None. Use "
                "for example budget=bl.Budget(rtol=1e-8)."
            )
            raise ValueError(msg)
        leaves, self._treedef = jax.tree.flatten(theta0)
        self._fixed = [leaf if _is_fixed(leaf) else None for leaf in leaves]
        moving = [np.asarray(leaf) for leaf in leaves if not _is_fixed(leaf)]
        if not moving:
            msg = (
                "scipy_objective: theta0 must hold at least one real number to move, got "
                f"{theta0!r}. Give floats."
            )
            raise ValueError(msg)
        self._like = [(leaf.shape, leaf.dtype) for leaf in moving]
        self._evaluate = evaluate
        self._x0 = jax.tree.map(_strong, x0)
        self._x = self._x0
        self._adjoint = None
        if warm_adjoint:
            self._adjoint = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._x)
        self._warm_start = warm_start
        self.budget = budget
        self.adjoint_budget = adjoint_budget
        self.controller = controller
        self.state: Any = None if controller is None else controller.init()
        self.start = np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in moving])
        self.history: list[Evaluation] = []
        self.result: bl.Hypergradient | None = None

    def theta(self, flat: ArrayLike) -> PyTree:
        """The pytree like `theta0` of a flat vector, its moving leaves as NumPy arrays.

        **Raises:** `ValueError` for a vector of another length.
        """
        vector = np.asarray(flat)
        if vector.shape != self.start.shape or not np.isrealobj(vector):
            msg = (
                f"ScipyObjective: expected a real vector of shape {self.start.shape}, as theta0 "
                f"has so many numbers, got {vector.dtype} of shape {vector.shape}. Start the "
                "optimizer at .start."
            )
            raise ValueError(msg)
        parts: list[NDArray[Any]] = []
        at = 0
        for shape, dtype in self._like:
            size = int(np.prod(shape))
            parts.append(vector[at : at + size].reshape(shape).astype(dtype))
            at += size
        moving = iter(parts)
        leaves = [next(moving) if leaf is None else leaf for leaf in self._fixed]
        return jax.tree.unflatten(self._treedef, leaves)

    def flat(self, theta: PyTree) -> NDArray[np.float64]:
        """The flat vector of a pytree like `theta0`, its gradient say."""
        # A gradient has None where a leaf does not move; θ may have Nones of its own.
        leaves = self._treedef.flatten_up_to(theta)
        moving = [
            np.ravel(np.asarray(leaf)).astype(np.float64)
            for leaf, fixed in zip(leaves, self._fixed, strict=True)
            if fixed is None
        ]
        return np.concatenate(moving)

    @property
    def x(self) -> PyTree:
        """The last inner solution, like `x0`; the start before the first call."""
        return self._x0 if self.result is None else self.result.primal.value

    def __call__(self, flat: ArrayLike) -> tuple[float, NDArray[np.float64]]:
        """Value and gradient at a flat vector, both in double precision.

        **Raises:** `NonFiniteEvaluationError` where theta, value or gradient is not finite;
        the next call then starts as this one did. `ValueError` for a vector of another
        length.
        """
        theta = self.theta(flat)
        vector = np.array(flat, np.float64)
        if not np.isfinite(vector).all():
            msg = (
                f"ScipyObjective: the optimizer asks for a point that is not finite, {vector}. "
                "Bound its steps, or scale theta."
            )
            raise NonFiniteEvaluationError(msg, theta, None)
        primal = adjoint = 0
        repeats = 0
        while True:
            fidelity = self._fidelity()
            result = self._evaluate(theta, self._x, self._adjoint, fidelity)
            value, gradient = float(result.value), self.flat(result.gradient)
            primal += int(np.sum(result.cost.primal_iterations))
            adjoint += int(np.sum(result.cost.adjoint_iterations))
            finite = bool(np.isfinite(value) and np.isfinite(gradient).all())
            if finite:
                self._keep(result)
            metric, repeats = value if finite else np.nan, repeats + 1
            if self._accepted(theta, fidelity, result, metric, gradient):
                break
            if repeats == MOST_REPEATS:
                break
        if not finite:
            msg = (
                f"ScipyObjective: the outer loss is {value} and its gradient has norm "
                f"{np.linalg.norm(gradient)} at theta = {vector}. {_reason(result)}"
            )
            raise NonFiniteEvaluationError(msg, theta, result)
        self.result = result
        error = np.nan if result.error is None else float(result.error.total)
        self.history.append(
            Evaluation(vector, value, float(np.linalg.norm(gradient)), error, primal, adjoint)
        )
        return value, gradient

    def _fidelity(self) -> bl.Fidelity | None:
        if self.controller is not None:
            return self.controller.fidelity(self.state)
        if self.budget is None:
            return None
        return bl.Fidelity(self.budget, self.adjoint_budget)

    def _keep(self, result: bl.Hypergradient) -> None:
        """Start the next solves where these ended."""
        if self._warm_start:
            self._x = result.primal.value
            if self._adjoint is not None:
                self._adjoint = result.adjoint.value

    def _accepted(
        self,
        theta: PyTree,
        fidelity: bl.Fidelity | None,
        result: bl.Hypergradient,
        value: float,
        gradient: NDArray[np.float64],
    ) -> bool:
        """Tell the controller; whether it takes this hypergradient, or has no finer one."""
        controller = self.controller
        if controller is None or fidelity is None:
            return True
        norm = float(np.linalg.norm(gradient))
        error: Any = result.error
        if isinstance(controller, bl.AutomaticRefinement):
            error = self._differences(controller, theta)
        self.state = controller.update(self.state, value, gradient_norm=norm, error=error)
        if bool(getattr(self.state, "accepted", True)):
            return True
        following = controller.fidelity(self.state)
        same = [
            np.array_equal(np.asarray(new), np.asarray(old))
            for new, old in zip(
                jax.tree.leaves((following.budget, following.adjoint_budget)),
                jax.tree.leaves((fidelity.budget, fidelity.adjoint_budget)),
                strict=True,
            )
        ]
        return all(same)

    def _differences(self, controller: bl.AutomaticRefinement, theta: PyTree) -> Any:
        if not bool(controller.due(self.state)):
            return None
        a, b, c = (
            self.flat(self._evaluate(theta, self._x, self._adjoint, fidelity).gradient)
            for fidelity in controller.compared(self.state)
        )
        return bl.Differences(float(np.linalg.norm(a - b)), float(np.linalg.norm(b - c)))


def scipy_objective(
    outer_loss: Callable[[Any, Any], Array],
    problem: object,
    theta0: PyTree,
    x0: PyTree,
    *,
    solver: bl.InnerSolver | None = None,
    estimator: bl.Estimator | None = None,
    budget: bl.Budget | None = None,
    adjoint_budget: bl.Budget | None = None,
    controller: bl.Controller[Any] | None = None,
    error: bl.ErrorEstimator | bool = True,
    warm_start: bool = True,
) -> ScipyObjective:
    """The function for `scipy.optimize.minimize(objective, objective.start, jac=True)`.

    It takes a flat vector of float64 and returns value and gradient of the outer loss L(θ)
    = outer_loss(x(θ), θ), both float64 whatever the dtypes of `theta0`: what
    `bl.hypergradient` finds.  Primal and adjoint solves start where those of the last call
    ended.

    **Arguments:**

    - `theta0`: any pytree; floats and float arrays of it move, whole numbers and the rest
        stay as they are. Python floats are double, hence of JAX's default precision.
    - `budget`, `adjoint_budget`: as for `bl.hypergradient`; set the attributes of the same
        names to change them between calls, without a compilation.
    - `controller`: moves both budgets a call at a time. Where it does not accept a
        hypergradient, the call is repeated with the next fidelity. The controller sees
        every call, those of a line search, too.
    - `error`: whether, and how, the truncation error is estimated for the history.
    - `warm_start`: `False` starts every call at `x0`.
    - the others: as for `bl.hypergradient`.

    **Returns:** a [`ScipyObjective`][].

    **Raises:** `ValueError` for a theta0 without a number to move, for budgets beside a
    controller, and for one that reads the error where none is estimated; `TypeError` for
    complex numbers. Calls raise `NonFiniteEvaluationError`.

    An inexact gradient may end a line search early (SciPy says "ABNORMAL"): the remedy is a
    tighter budget, and `history` shows the error beside the gradient's norm.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> from scipy.optimize import minimize
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta["centre"]) ** 2))
    >>> objective = scipy_objective(
    ...     lambda x, theta: jnp.sum((x - jnp.arange(3.0)) ** 2),
    ...     problem,
    ...     {"centre": jnp.zeros(3)},
    ...     jnp.zeros(3),
    ... )
    >>> found = minimize(objective, objective.start, jac=True, method="L-BFGS-B")
    >>> [round(float(v), 2) for v in objective.theta(found.x)["centre"]]
    [0.0, 1.0, 2.0]
    """
    judged = error is not False
    if controller is not None and "error" in controller.requires and not judged:
        msg = (
            f"scipy_objective: {type(controller).__name__} reads the error of the hypergradient, "
            "got error=False. Leave error=True."
        )
        raise ValueError(msg)

    def evaluate(
        theta: PyTree, x0: PyTree, adjoint_guess: PyTree | None, fidelity: bl.Fidelity | None
    ) -> bl.Hypergradient:
        return bl.hypergradient(
            outer_loss,
            problem,
            theta,
            x0,
            solver=solver,
            estimator=estimator,
            adjoint_guess=adjoint_guess,
            fidelity=fidelity,
            error=error,
        )

    return ScipyObjective(
        evaluate,
        theta0,
        x0,
        budget=budget,
        adjoint_budget=adjoint_budget,
        controller=controller,
        warm_start=warm_start,
        warm_adjoint=warm_start and (estimator is None or estimator.solves_adjoint),
    )


def _strong(leaf: Any) -> Any:
    """An array without a weak type: the next start, which is a result, has none."""
    if isinstance(leaf, jax.Array):
        return jnp.asarray(leaf, leaf.dtype)
    return np.asarray(leaf)


def _is_fixed(leaf: Any) -> bool:
    """Whether a leaf of theta is none that moves.

    **Raises:** `TypeError` for a complex one.
    """
    if not eqx.is_array_like(leaf):
        return True
    dtype = np.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        msg = (
            f"scipy_objective: theta0 must be real, got {dtype}. Give real and imaginary parts as "
            "two arrays."
        )
        raise TypeError(msg)
    return not jnp.issubdtype(dtype, jnp.floating)


def _reason(result: bl.Hypergradient) -> str:
    """How the solves ended, one or many."""
    return f"Primal: {result.primal.diagnosis} Adjoint: {result.adjoint.diagnosis}"
