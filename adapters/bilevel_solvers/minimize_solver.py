"""SciPy's minimisers as black boxes."""

from typing import Any, ClassVar

import equinox as eqx
import numpy as np
import scipy.optimize
from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel_solvers.black_box import BlackBox, Run
from bilevel_solvers.choice import frozen, thawed, tried
from bilevel_solvers.host_code import FlatProblem, HostRun, call_host

NEVER: dict[str, dict[str, Any]] = {
    "BFGS": {"gtol": 0.0},
    "CG": {"gtol": 0.0},
    "L-BFGS-B": {"gtol": 0.0, "ftol": 0.0, "maxfun": 10**9},
    "TNC": {"gtol": 0.0, "ftol": 0.0, "xtol": 0.0, "maxfun": 10**9},
    "SLSQP": {"ftol": 0.0},
    "Newton-CG": {"xtol": 0.0},
    "dogleg": {"gtol": 0.0},
    "trust-ncg": {"gtol": 0.0},
    "trust-krylov": {"gtol": 0.0},
    "trust-exact": {"gtol": 0.0},
    "Nelder-Mead": {"xatol": 0.0, "fatol": 0.0, "maxfev": 10**9},
    "Powell": {"xtol": 0.0, "ftol": 0.0, "maxfev": 10**9},
}
"""The methods, and what keeps each from stopping by a measure of its own."""

WITHOUT_GRADIENT = ("Nelder-Mead", "Powell")
WITH_PRODUCTS = ("Newton-CG", "trust-ncg", "trust-krylov")
WITH_HESSIAN = ("dogleg", "trust-exact")

REACHED = 3 / 8
"""The power of rounding that line searches reach with the gradient; the root is in their way."""


class ScipyMinimize(BlackBox):
    """A minimiser of SciPy; made by [`scipy_minimize`][]."""

    requires: ClassVar[frozenset[str]] = frozenset({"objective"})
    conditioned: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    method: str = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())

    @property
    def title(self) -> str:
        """The method's name."""
        return f"scipy_minimize({self.method!r})"

    def default_budget(self, x0: PyTree) -> Budget:
        """As far as comparing values of the objective gets: a relative 1e-6 in double precision."""
        cap = super().default_budget(x0).iterations
        return Budget(iterations=cap, rtol=vector.epsilon(x0) ** REACHED)

    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """A call of `scipy.optimize.minimize`."""
        flat = FlatProblem(problem, asked.start)
        functions: list[Any] = [flat.residual]
        functions.append(
            flat.objective if self.method in WITHOUT_GRADIENT else flat.value_and_gradient
        )
        if self.method in WITH_PRODUCTS:
            functions.append(flat.product)
        if self.method in WITH_HESSIAN:
            functions.append(flat.jacobian)
        return call_host(self._minimize, problem, flat, asked, functions)

    def _minimize(self, run: HostRun) -> tuple[Any, int]:
        last: dict[str, Any] = {}

        def value_and_gradient(x: Any) -> tuple[float, Any]:
            value, gradient = run.functions["value_and_gradient"](x)
            last.update(x=np.array(x), norm=float(np.linalg.norm(gradient)))
            return float(value), gradient

        def progress(x: Any, *_: Any) -> None:
            known = "x" in last and np.array_equal(last["x"], x)
            run.progress(x, last["norm"] if known else None)

        options = NEVER[self.method] | thawed(self.options) | {"maxiter": run.iterations}
        arguments: dict[str, Any] = {"method": self.method, "callback": progress}
        if self.method in WITHOUT_GRADIENT:
            arguments["fun"] = lambda x: float(run.functions["objective"](x))
        else:
            arguments |= {"fun": value_and_gradient, "jac": True}
        if self.method in WITH_PRODUCTS:
            arguments["hessp"] = run.functions["product"]
        if self.method in WITH_HESSIAN:
            arguments["hess"] = run.functions["jacobian"]
        minimize: Any = scipy.optimize.minimize
        result = minimize(x0=run.start, options=options, **arguments)
        return result.x, max(run.count, min(int(getattr(result, "nit", 0)), run.iterations))


def scipy_minimize(method: str = "L-BFGS-B", **options: Any) -> ScipyMinimize:
    """`scipy.optimize.minimize` as an inner solver: a black box on the host.

    Gradients, and where a method takes them Hessian products or Hessians, come from JAX.  The cap
    of the budget is traced and kept exactly, in the method's own iterations, and a run ends when
    the Euclidean norm of the gradient is what the budget asks for, whatever the method measures
    itself.  A line search compares values of the objective, which rounding blurs when the gradient
    is about 1e-8 of the first: there most methods stop with `ROUNDING`, and the default tolerance
    is 1e-6.  It works under jit and vmap, one sample after another, in SciPy's double precision,
    and does not unroll: use `Implicit`.

    **Arguments:**

    - `method`: "BFGS", "CG", "L-BFGS-B", "TNC", "SLSQP", "Newton-CG", "dogleg", "trust-ncg",
        "trust-krylov", "trust-exact"; "Nelder-Mead" and "Powell" use no
        gradient, whose norm is evaluated after each iteration all the same. Bounds and
        constraints are not among the options: the solution would not make the gradient vanish.
    - `options`: of the method, such as `maxcor=20`, hashable; without `maxiter`, which the
        budget is.

    **Raises:** `ValueError` for another method or `maxiter`.

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_solvers
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.cosh(x) - theta * x))
    >>> solution = bl.solve(
    ...     problem, 1.0, jnp.zeros(2), solver=bilevel_solvers.scipy_minimize("BFGS")
    ... )
    >>> [round(float(v), 3) for v in solution.value]
    [0.881, 0.881]
    """
    names = {name.lower(): name for name in NEVER}
    if not isinstance(method, str) or method.lower() not in names:
        msg = f"scipy_minimize: method must be one of {', '.join(NEVER)}, got {method!r}."
        raise ValueError(msg)
    kept = frozen("scipy_minimize", options, taken=("maxiter",))
    name = names[method.lower()]

    def trial() -> object:
        given: dict[str, Any] = {} if name in WITHOUT_GRADIENT else {"jac": lambda x: 2.0 * x}
        if name in (*WITH_PRODUCTS, *WITH_HESSIAN):
            given["hess"] = lambda x: 2.0 * np.eye(x.size)
        minimize: Any = scipy.optimize.minimize
        start = np.ones(2)
        return minimize(
            lambda x: float(x @ x), start, method=name, options={**options, "maxiter": 1}, **given
        )

    tried("scipy_minimize", options, trial)
    return ScipyMinimize(method=name, options=kept)
