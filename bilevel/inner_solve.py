"""`bl.solve`: an inner solve as one differentiable function."""

import importlib
import inspect
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel.affine import as_linear
from bilevel.budget import Budget
from bilevel.checking import check_functions
from bilevel.compilation import compiled
from bilevel.context import evaluating
from bilevel.estimator.base import Estimator, Record, Setting
from bilevel.estimator.implicit import Implicit
from bilevel.naming import public_name
from bilevel.probe import AdjointProbe, Probe
from bilevel.problem import InnerProblem, LinearSystem, as_inner_problem
from bilevel.refinement.fidelity import Fidelity
from bilevel.signature import brief
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.default import default_solver
from bilevel.solver.examination import examine

AnyProbe: TypeAlias = Probe | AdjointProbe


def solve(
    problem: object,
    theta: PyTree,
    x0: PyTree,
    *,
    solver: InnerSolver | None = None,
    estimator: Estimator | None = None,
    budget: Budget | None = None,
    adjoint_budget: Budget | None = None,
    adjoint_guess: PyTree | None = None,
    fidelity: Fidelity | None = None,
    probe: AnyProbe | None = None,
    history: int = 0,
) -> Solution:
    """Solve an inner problem to a budget, differentiably.

    Works under `jax.jit`, `jax.grad`, `jax.jvp`, `jax.vmap` and `jax.hessian`; outside jit
    it compiles itself once, whatever the budgets.

    **Arguments:**

    - `problem`: an inner problem, or any object with `residual(x, theta)`.
    - `theta`: any pytree; what the solution is differentiated with respect to.
    - `x0`: the start, any pytree of float or complex arrays. A good one is a warm start.
    - `solver`: an inner solver; `None` picks one from the kind and size of the problem.
    - `estimator`: how the derivative is obtained; [`Implicit`][] by default, with the
        solver of a linear system for its adjoint, too, preconditioner and factors included,
        unless it is a stationary one.
    - `budget`: of the primal solve. By default a relative tolerance of ε^(2/3), with ε the
        rounding error of the dtype of `x0`: 2e-5 in single precision, 4e-11 in double, of
        [`Solution.scale`][], under a generous cap. For more, name a smaller `rtol`, or a cap
        alone: `Budget(iterations=1000)` goes on until rounding stops it.
    - `adjoint_budget`: of the solves of the derivative, relative to their own right-hand
        side. By default the same tolerance as for `budget`; never taken from `budget`.
    - `adjoint_guess`: where the adjoint solve starts, like `x0`; zero by default.
    - `fidelity`: `budget`, `adjoint_budget` and, for an outer loop, a `Probe` in one.
    - `probe`: `Probe.zeros()` or `AdjointProbe.zeros(x0)`; its cotangent is what the solves
        did. An `AdjointProbe` goes with a fidelity that holds a `Probe`, too.
    - `history`: how many residual norms to keep, static.

    **Returns:** a [`Solution`][]; its `value` is like `x0` and carries the derivative.

    **Raises:** `TypeError` or `ValueError` for arguments that do not fit, and
    `IncompatibleError` for a solver that cannot work on the problem, all before anything
    runs.

    >>> import jax, jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(lambda theta: jnp.diag(theta), jnp.ones(2))
    >>> def loss(theta):
    ...     return jnp.sum(bl.solve(problem, theta, jnp.zeros(2)).value)
    >>> [float(g) for g in jax.grad(loss)(jnp.array([1.0, 2.0]))]
    [-1.0, -0.25]
    """
    setting, estimator, record = arrange(
        problem,
        theta,
        x0,
        solver=solver,
        estimator=estimator,
        budget=budget,
        adjoint_budget=adjoint_budget,
        adjoint_guess=adjoint_guess,
        fidelity=fidelity,
        probe=probe,
        history=history,
    )
    return _solve(
        setting.problem,
        setting.theta,
        setting.x0,
        setting.solver,
        estimator,
        setting.budget,
        setting.adjoint_budget,
        setting.adjoint_guess,
        record,
        setting.history,
    )


@compiled
def _solve(
    problem: InnerProblem,
    theta: PyTree,
    x0: PyTree,
    solver: InnerSolver,
    estimator: Estimator,
    budget: Budget,
    adjoint_budget: Budget | None,
    adjoint_guess: PyTree | None,
    record: Record,
    history: int,
) -> Solution:
    setting = complete(
        Setting(problem, theta, x0, solver, budget, adjoint_budget, adjoint_guess, history)
    )
    return estimator.solve(setting, record)


def arrange(
    problem: object,
    theta: PyTree,
    x0: PyTree,
    *,
    solver: InnerSolver | None,
    estimator: Estimator | None,
    budget: Budget | None,
    adjoint_budget: Budget | None,
    adjoint_guess: PyTree | None,
    fidelity: Fidelity | None,
    probe: AnyProbe | None,
    history: int,
) -> tuple[Any, Estimator, Record]:
    """Check what the user gave, before anything is traced, and bring it into one form."""
    counts = probe if isinstance(probe, Probe) else None
    if fidelity is not None:
        if not isinstance(fidelity, Fidelity):
            hint = " Write budget=..." if isinstance(fidelity, Budget) else ""
            msg = f"fidelity must be a Fidelity, got {fidelity!r}.{hint}"
            raise TypeError(msg)
        given = [
            name
            for name, value in (
                ("budget", budget),
                ("adjoint_budget", adjoint_budget),
                # One of each kind reports side by side.
                ("probe", counts if fidelity.probe is not None else None),
            )
            if value is not None
        ]
        if given:
            msg = f"fidelity already holds {given[0]}: give one of the two, not both."
            raise TypeError(msg)
        budget, adjoint_budget = fidelity.budget, fidelity.adjoint_budget
        counts = fidelity.probe if counts is None else counts
    for name, value, kind in (
        ("solver", solver, InnerSolver),
        ("estimator", estimator, Estimator),
        ("budget", budget, Budget),
        ("adjoint_budget", adjoint_budget, Budget),
        ("probe", probe, Probe | AdjointProbe),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(_wrong_kind(name, value))
    problem = as_inner_problem(problem)
    estimator = _default_estimator(problem, solver) if estimator is None else estimator
    estimator.check_budget(budget)
    x0 = as_vector("x0", x0)
    if adjoint_guess is not None:
        if not estimator.solves_adjoint:
            msg = (
                f"adjoint_guess: {type(estimator).__name__} solves no adjoint that could start "
                "there. Leave adjoint_guess out, or use Implicit."
            )
            raise TypeError(msg)
        adjoint_guess = as_vector("adjoint_guess", adjoint_guess)
        _require_like("adjoint_guess", adjoint_guess, x0)
    setting = Setting(
        problem=problem,
        theta=jax.tree.map(_as_array, theta),
        x0=x0,
        solver=solver,  # pyright: ignore[reportArgumentType]
        budget=_as_arrays(budget),  # pyright: ignore[reportArgumentType]
        adjoint_budget=_as_arrays(adjoint_budget),
        adjoint_guess=adjoint_guess,
        history=history,
    )
    examine(solver, getattr(setting.problem, "operator", None))
    detail = probe if isinstance(probe, AdjointProbe) else None
    return setting, estimator, Record(counts, detail)


def _default_estimator(problem: InnerProblem, solver: InnerSolver | None) -> Estimator:
    """Implicit; what a user chose for a linear system is right for its transpose."""
    if solver is None or solver.stationary or not solver.linear_adjoint:
        return Implicit()
    return Implicit(solver if isinstance(problem, LinearSystem) else None)


def complete(setting: Setting) -> Setting:
    """Fill in the defaults that depend on the problem, and check what its functions return."""
    linear = isinstance(setting.problem, LinearSystem)
    with evaluating(f"{'operator(theta), rhs' if linear else 'at'}(theta)", theta=setting.theta):
        bound = setting.problem.at(setting.theta)
    check_functions(bound, setting.x0, setting.theta)
    solver = setting.solver
    problem = as_linear(setting.problem, setting.theta, setting.x0, solver)
    problem = problem.anchored(setting.theta, setting.x0)
    bound = problem.at(setting.theta)
    if solver is None:
        solver = default_solver(bound, setting.x0)
    budget = setting.budget
    if budget is None:
        budget = solver.default_budget(setting.x0)
    return Setting(
        problem,
        setting.theta,
        setting.x0,
        solver,
        budget,
        setting.adjoint_budget,
        setting.adjoint_guess,
        setting.history,
    )


def _wrong_kind(name: str, value: object) -> str:
    expected = {
        "solver": "an InnerSolver such as ConjugateGradient()",
        "estimator": "an Estimator such as Implicit()",
        "budget": "a Budget",
        "adjoint_budget": "a Budget",
        "probe": "a Probe or AdjointProbe",
    }[name]
    hint = ""
    if isinstance(value, type):
        arguments = ".zeros()" if name == "probe" else "(...)"
        hint = f" Write {name}={value.__name__}{arguments}."
    elif isinstance(value, Estimator):
        hint = f" Write estimator={type(value).__name__}(...)."
    elif isinstance(value, InnerSolver):
        hint = f" Write solver={type(value).__name__}(...)."
    elif name.endswith("budget") and isinstance(value, int):
        hint = f" Write {name}=Budget(iterations={value!r})."
    elif name.endswith("budget") and isinstance(value, float):
        hint = f" Write {name}=Budget(rtol={value!r})."
    elif isinstance(value, str) and name in _KINDS:
        meant = public_name(value, _KINDS[name])
        hint = "" if meant is None else f" Write {name}=bl.{meant}({_arguments(meant)})."
    elif name == "solver" and callable(getattr(value, "update", None)):
        hint = " Wrap an optax transformation: solver=bl.Optax(optax.adam(0.1)), for one."
    return f"{name} must be {expected}, got {brief(value)}.{hint}"


def _arguments(name: str) -> str:
    """What a class asks for, as its signature has it: `step_size=...` for one."""
    parameters = inspect.signature(getattr(importlib.import_module("bilevel"), name)).parameters
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    return ", ".join(f"{key}=..." for key in needed)


_KINDS: dict[str, type] = {"solver": InnerSolver, "estimator": Estimator}


_FEWEST_BITS = 32


def as_vector(name: str, x: PyTree) -> PyTree:
    """The pytree with array leaves.

    **Raises:** `TypeError` naming the leaf that is no float or complex array.
    """

    def convert(path: Any, leaf: Any) -> Any:
        where = f"{name}{jax.tree_util.keystr(path)}"
        try:
            array = jnp.asarray(leaf)
        except TypeError:
            msg = f"{where} must be a float or complex array, got {type(leaf).__name__}."
            raise TypeError(msg) from None
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            msg = (
                f"{where} must be a float or complex array, got {array.dtype}. Use "
                f"{where}.astype(float), or move it into theta or the problem's own data."
            )
            raise TypeError(msg)
        if jnp.finfo(array.dtype).bits < _FEWEST_BITS:
            msg = (
                f"{where} is {array.dtype}, in which no tolerance and no factorisation holds. "
                f"Solve in single precision: {where}.astype(jnp.float32), with theta and the data "
                "in it, and convert the solution."
            )
            raise TypeError(msg)
        return jnp.asarray(array, array.dtype)  # no weak type: the loop keeps dtypes

    leaves = jax.tree_util.tree_leaves(x)
    if not leaves:
        msg = f"{name} must hold at least one array, got an empty pytree {x!r}."
        raise TypeError(msg)
    return jax.tree_util.tree_map_with_path(convert, x)


def _require_like(name: str, given: PyTree, x0: PyTree) -> None:
    def kinds(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)

    if kinds(given) != kinds(x0):
        msg = (
            f"{name} must be like x0, {kinds(x0)}, got {kinds(given)}. Give an adjoint solution "
            "of the same problem, or leave it out for a start at zero."
        )
        raise TypeError(msg)


def _as_arrays(budget: Budget | None) -> Budget | None:
    if budget is None:
        return None
    leaves = (budget.iterations, budget.rtol, budget.atol)
    iterations, rtol, atol = (
        leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, dtype)
        for leaf, dtype in zip(leaves, (np.int32, float, float), strict=True)
    )
    return eqx.tree_at(lambda b: (b.iterations, b.rtol, b.atol), budget, (iterations, rtol, atol))


def _as_array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, int | float | complex | np.ndarray) else leaf
