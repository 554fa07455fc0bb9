"""Scikit-learn's estimators as black boxes."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.signature import brief, check_callable
from bilevel.solver.base import IncompatibleError
from bilevel_solvers.black_box import BlackBox, Run
from bilevel_solvers.host_code import FlatProblem, HostRun, call_host
from bilevel_solvers.host_solver import checked
from bilevel_solvers.library import load


class _Data:
    """Arrays that a fit gets, compared by identity: part of the solver, never of the program."""

    def __init__(self, X: Any, y: Any):
        self.X, self.y = X, y


class SklearnEstimator(BlackBox):
    """A fit of a scikit-learn estimator; made by [`sklearn`][]."""

    conditioned: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    estimator: Any = eqx.field(static=True)
    data: _Data = eqx.field(static=True)
    solution: Callable[..., Any] = eqx.field(static=True)
    parameters: Callable[..., Any] | None = eqx.field(static=True, default=None)
    fit_parameters: Callable[..., Any] | None = eqx.field(static=True, default=None)

    @property
    def title(self) -> str:
        """The name of the estimator's class."""
        return f"sklearn({type(self.estimator).__name__})"

    def check(self, problem: BoundProblem) -> None:
        """Refuse a problem that does not tell θ.

        **Raises:** `IncompatibleError`.
        """
        super().check(problem)
        if problem.theta is None:
            msg = (
                f"{self.title} cannot solve this {problem.name}: the estimator's parameters come "
                "from theta, and the problem does not tell it. Let the problem's at(theta) return "
                "a BoundProblem with theta=theta, and theta not be None."
            )
            raise IncompatibleError(msg)

    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """A fit."""
        flat = FlatProblem(problem, asked.start)
        like = jax.eval_shape(lambda: asked.start)

        def body(run: HostRun) -> tuple[Any, int]:
            return self._fit(run, like)

        return call_host(body, problem, flat, asked, [], with_theta=True)

    def _fit(self, run: HostRun, like: PyTree) -> tuple[Any, int]:
        leaves: list[Any] = jax.tree.leaves(run.theta)
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            return np.full(run.start.shape, np.nan), 0
        theta = run.theta
        estimator = self.estimator
        if not hasattr(estimator, "fit"):
            estimator = estimator(theta)
        estimator = load("sklearn.base").clone(estimator)
        known = estimator.get_params()
        numbers: dict[str, Any] = {}
        if known.get("max_iter") is not None or known.get("max_iter", 0) is None:
            numbers["max_iter"] = run.iterations
        if "tol" in known:
            numbers["tol"] = max(run.tolerance, float(np.finfo(float).tiny))
        given = {} if self.parameters is None else self.parameters(theta)
        estimator.set_params(**numbers | given)
        X, y = (part(theta) if callable(part) else part for part in (self.data.X, self.data.y))
        more = {} if self.fit_parameters is None else self.fit_parameters(theta)
        estimator.fit(X, y, **more)
        x = checked(f"{self.title}: solution", self.solution(estimator, theta), like)
        done: Any = getattr(estimator, "n_iter_", None)
        count = 1 if done is None else int(np.max(done))
        return x, min(max(count, 1), run.iterations)


def sklearn(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    solution: Callable[..., Any],
    parameters: Callable[..., Any] | None = None,
    fit_parameters: Callable[..., Any] | None = None,
) -> SklearnEstimator:
    """A scikit-learn estimator as an inner solver: a black box whose coefficients are x.

    What it minimises has to be written down a second time, as the inner problem: that is what is
    differentiated implicitly, and whose residual confirms the fit.  A factor between the two is of
    no matter; another objective, an intercept that is penalised here and not there, a mean for a
    sum next to a penalty show as the status `STOPPED`, and a gradient of NaN.

    The cap and the tolerance of the budget are traced, and become `max_iter` and `tol` where the
    estimator has them; its `tol` measures something of its own, so that a fit may be repeated with
    a smaller one.  Each fit starts afresh.  `n_iter_` is counted, 1 for an estimator without it.
    It works under jit and vmap and does not unroll.

    **Arguments:**

    - `estimator`: with its settings, cloned for every fit; or a function theta -> estimator.
    - `X`, `y`: what it is fitted to, or functions of θ. NumPy arrays.
    - `solution`: (fitted estimator, theta) -> x, like x0; θ has NumPy leaves, here as below.
    - `parameters`: theta -> parameters of the estimator by name.
    - `fit_parameters`: theta -> more arguments of `fit` by name, such as `sample_weight`.

    **Raises:** `TypeError` for what is no estimator or cannot be called like this.

    >>> import numpy as np, jax, jax.numpy as jnp, bilevel as bl, bilevel_solvers
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.eye(3)[:, :2], np.array([2.0, 4.0, 0.0])
    >>> def objective(w, penalty):
    ...     return jnp.sum((X @ w - y) ** 2) + penalty * jnp.sum(w**2)
    >>> solver = bilevel_solvers.sklearn(
    ...     Ridge(fit_intercept=False),
    ...     X,
    ...     y,
    ...     parameters=lambda penalty: {"alpha": float(penalty)},
    ...     solution=lambda fitted, penalty: fitted.coef_,
    ... )
    >>> def total(penalty):
    ...     problem = bl.Minimization(objective)
    ...     return jnp.sum(bl.solve(problem, penalty, jnp.zeros(2), solver=solver).value)
    >>> value, slope = jax.value_and_grad(total)(1.0)
    >>> round(float(value), 4), round(float(slope), 4)
    (3.0, -1.5)
    """
    load("sklearn")
    if isinstance(estimator, type) or not (hasattr(estimator, "fit") or callable(estimator)):
        hint = f" Write {estimator.__name__}()." if isinstance(estimator, type) else ""
        msg = (
            "sklearn: estimator must be an estimator such as Ridge(), or a function of theta that "
            f"returns one, got {brief(estimator)}.{hint}"
        )
        raise TypeError(msg)
    check_callable("sklearn", "solution", solution, ("fitted", "theta"))
    for name, function in (("parameters", parameters), ("fit_parameters", fit_parameters)):
        if function is not None:
            check_callable("sklearn", name, function, ("theta",))
    return SklearnEstimator(
        estimator=estimator,
        data=_Data(X, y),
        solution=solution,
        parameters=parameters,
        fit_parameters=fit_parameters,
    )
