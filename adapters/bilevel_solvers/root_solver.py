"""SciPy's root finders as black boxes."""

from typing import Any, ClassVar

import equinox as eqx
import numpy as np
import scipy.optimize
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel_solvers.black_box import BlackBox, Run
from bilevel_solvers.choice import frozen, thawed, tried
from bilevel_solvers.host_code import Enough, FlatProblem, HostRun, call_host

BY_EVALUATIONS = ("hybr", "lm")
"""MINPACK's, which have no callback: an iteration is an evaluation away from the start."""

BY_ITERATIONS = (
    "broyden1",
    "broyden2",
    "anderson",
    "linearmixing",
    "diagbroyden",
    "excitingmixing",
    "krylov",
    "df-sane",
)

TRIALS = 100
"""Evaluations in one iteration of "df-sane" that halve its step to nothing."""

GAVE_UP = ("infs or NaNs", "Jacobian inversion yielded zero vector")
"""How SciPy's own methods end where they break down; the residual says how far they got."""


class ScipyRoot(BlackBox):
    """A root finder of SciPy; made by [`scipy_root`][]."""

    conditioned: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    method: str = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())

    @property
    def title(self) -> str:
        """The method's name."""
        return f"scipy_root({self.method!r})"

    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """A call of `scipy.optimize.root`."""
        flat = FlatProblem(problem, asked.start)
        functions: list[Any] = [flat.residual]
        if self.method in BY_EVALUATIONS:
            functions.append(flat.jacobian)
        return call_host(self._root, problem, flat, asked, functions)

    def _root(self, run: HostRun) -> tuple[Any, int]:
        return (
            self._by_evaluations(run) if self.method in BY_EVALUATIONS else self._by_callbacks(run)
        )

    def _by_evaluations(self, run: HostRun) -> tuple[Any, int]:
        """By a method that calls nobody back: its evaluations are what is counted."""
        residual = run.functions["residual"]
        best = [np.inf]

        def counted(x: Any) -> Any:
            value = residual(x)
            if np.array_equal(x, run.start):
                return value
            norm = float(np.linalg.norm(value))
            run.count += 1
            if norm < best[0]:
                best[0], run.x = norm, np.array(x)
            if run.count >= run.iterations or norm <= run.target:
                raise Enough
            return value

        root: Any = scipy.optimize.root
        options = {"xtol": 0.0} | thawed(self.options)
        jacobian = run.functions["jacobian"]
        result = root(counted, run.start, method=self.method, jac=jacobian, options=options)
        return result.x, run.count

    def _by_callbacks(self, run: HostRun) -> tuple[Any, int]:
        """By a method that calls back after every iteration."""
        residual = run.functions["residual"]
        root: Any = scipy.optimize.root
        given = thawed(self.options)
        options: dict[str, Any]
        tried = [0]

        def downhill(x: Any) -> Any:
            # The line search of "df-sane" has no end where nothing is left to gain.
            tried[0] += 1
            if self.method == "df-sane" and tried[0] > TRIALS:
                raise Enough
            return -residual(x)

        def progress(x: Any, value: Any) -> None:
            tried[0] = 0
            run.progress(x, float(np.linalg.norm(value)))

        options = {"fatol": run.target, "maxiter": run.iterations, "tol_norm": np.linalg.norm}
        if self.method == "df-sane":
            options = {"fatol": run.target, "ftol": 0.0, "maxfev": 10**9}
        if self.method == "krylov":
            options["jac_options"] = {"rdiff": run.epsilon**0.5}
        try:
            # SciPy starts with the Jacobian -1/α: the residual it has in mind points downhill.
            result = root(
                downhill,
                run.start,
                method=self.method,
                callback=progress,
                options=options | given,
            )
        except ValueError as error:
            if not any(words in str(error) for words in GAVE_UP):
                raise
            return run.x, run.count
        return result.x, run.count


def scipy_root(method: str = "hybr", **options: Any) -> ScipyRoot:
    """`scipy.optimize.root` as an inner solver: a black box on the host.

    The residual, and the dense Jacobian of "hybr" and "lm", come from JAX.  The cap of the budget
    is traced and kept exactly, and a run ends at the residual norm that the budget asks for.  It
    works under jit and vmap, one sample after another, in double precision, and does not unroll:
    use `Implicit`.

    **Arguments:**

    - `method`: "hybr" or "lm", which say nothing of their iterations, so that **one evaluation
        of the residual counts as an iteration**; or one of SciPy's own, "broyden1", "broyden2",
        "anderson", "linearmixing", "diagbroyden", "excitingmixing", "krylov", "df-sane", whose
        iterations count (that of "krylov" has many evaluations inside).
    - `options`: of the method, hashable; without `maxiter`, `fatol` and `ftol`, which the
        budget is.

    **Raises:** `ValueError` for another method, or an option that the budget is.

    >>> import bilevel as bl, bilevel_solvers
    >>> problem = bl.RootFinding(lambda x, theta: x**3 - theta)
    >>> solution = bl.solve(problem, 8.0, 1.5, solver=bilevel_solvers.scipy_root("hybr"))
    >>> round(float(solution.value), 4)
    2.0
    """
    methods = (*BY_EVALUATIONS, *BY_ITERATIONS)
    if method not in methods:
        msg = f"scipy_root: method must be one of {', '.join(methods)}, got {method!r}."
        raise ValueError(msg)
    kept = frozen("scipy_root", options, taken=("maxiter", "maxfev", "fatol", "ftol"))
    root: Any = scipy.optimize.root
    start = np.ones(2)
    tried("scipy_root", options, lambda: root(lambda x: x, start, method=method, options=options))
    return ScipyRoot(method=method, options=kept)
