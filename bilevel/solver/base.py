"""The inner-solver protocol: how one step is made, never when to stop."""

import abc
import inspect
from typing import Any, ClassVar, Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.naming import nearest, no_argument
from bilevel.status import Status

MOST_ITERATIONS = 10_000
"""Cap of a default budget."""


class IncompatibleError(TypeError):
    """A solver or estimator was paired with a problem it cannot work on.

    Raised while tracing, before anything runs.

    >>> import bilevel as bl
    >>> root = bl.RootFinding(lambda x, theta: x**3 - theta)
    >>> try:
    ...     bl.solve(root, 8.0, 1.0, solver=bl.GradientDescent(step_size=0.1))
    ... except bl.IncompatibleError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    GradientDescent cannot solve this RootFinding: it needs an objective to minimise, ...
    """


class InnerSolver(eqx.Module):
    """One iteration that drives the residual towards zero; subclass it for your own.

    A solver never decides when to stop: the one loop does, from the residual and the
    budget.  A state is any pytree of arrays of fixed shapes; the iterate is its attribute
    `x`, or the state itself, or what an overridden `value` returns.  The problem is a
    `bilevel.bound.BoundProblem`, the inner problem at one θ, whose residual points
    downhill.  Fields are declared as in a dataclass, without an `__init__`.  The shortest
    solver:

    >>> import bilevel as bl
    >>> class Damped(bl.InnerSolver):
    ...     factor: float = 0.5
    ...
    ...     def init(self, problem, x):
    ...         return x
    ...
    ...     def step(self, problem, state, residual):
    ...         return state + self.factor * residual
    >>> problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    >>> solution = bl.solve(problem, 1.0, 0.0, solver=Damped(), budget=bl.Budget(rtol=1e-5))
    >>> round(float(solution.value), 3)
    2.0

    What a subclass may declare:

    - `requires`: traits the problem must have, of "objective", "mapping", "operator",
        "symmetric", "positive_definite", "diagonal", "proximal"; checked before anything runs.
    - `instead`: what to use where `requires` is not met, for the message; by default the
        solvers of this package that suit the problem at hand.
    - `recursive`: the residual comes out of the solver's own recursion, and is confirmed
        by a true one before anything is called converged.
    - `stationary`: each step applies the same map, so that a residual that does not
        shrink over many steps means divergence.
    - `conditioned`: how many steps it takes grows with the condition number and not with
        the size, which is what its default budget then leaves room for. Whatever is
        `stationary` is that, too.
    - `divides_by_residual`: a step divides by the size of the residual, so that it has no
        derivative where that is exactly zero.
    - `adaptive`: how far or where a step goes is found from the residual (a line search, a
        least-squares fit, a normalised gradient), so that a step made afresh at the solution,
        where the residual is noise, says nothing of the solution.
    - `black_box`: a step is a whole run of somebody else's code, towards `problem.target` and
        of at most `problem.cap` iterations, which `done` counts. No derivative goes through it.
    - `linear_adjoint`: it can solve the linear systems of an adjoint.
    - `on_host`: its numbers go to the host and back in every step, also from an accelerator.
        Without it nothing leaves the device, which the project's own tests look at.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    instead: ClassVar[str] = ""
    recursive: ClassVar[bool] = False
    stationary: ClassVar[bool] = False
    conditioned: ClassVar[bool] = False
    divides_by_residual: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    black_box: ClassVar[bool] = False
    linear_adjoint: ClassVar[bool] = False
    on_host: ClassVar[bool] = False

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse an argument that there is not, and name the one that was meant."""
        del args
        known = inspect.signature(cls).parameters if options else {}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            for name in options:
                if name not in known:
                    msg = f"{cls.__name__}: {no_argument(name, known)}"
                    raise TypeError(msg)
        return super().__new__(cls)

    @abc.abstractmethod
    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The state at the start x."""

    @abc.abstractmethod
    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """The next state, given the downhill residual at the state's point."""

    def value(self, state: PyTree) -> PyTree:
        """The iterate to return, like x."""
        return getattr(state, "x", state)

    def point(self, state: PyTree) -> PyTree:
        """Where the residual is evaluated; the iterate itself unless extrapolated."""
        return self.value(state)

    def residual(self, problem: BoundProblem, state: PyTree) -> PyTree:
        """The downhill residual at the state's point; recursive solvers return their own."""
        return problem.residual(self.point(state))

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """What is computed once before the loop, put into the problem (preconditioners)."""
        return problem

    def failure(self, state: PyTree) -> Int[Array, ""]:
        """`Status.CONVERGED` while all is well, otherwise the status to stop with."""
        return jnp.int32(Status.CONVERGED)

    def done(self, state: PyTree) -> Int[Array, ""]:
        """Iterations that a `black_box` did since `init`; nobody asks another solver."""
        msg = f"{type(self).__name__}: a black_box must count its iterations. Define done(state)."
        raise TypeError(msg)

    def applications(self, state: PyTree, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """How often the residual or operator was applied in so many iterations."""
        return iterations + 1

    def inner_iterations(self, state: PyTree, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """How many iterations the innermost solver did in so many of this one."""
        del state
        return iterations

    def default_budget(self, x0: PyTree) -> Budget:
        """The budget where the user gives none: `default_tolerance`, with a generous cap."""
        cap = MOST_ITERATIONS
        if not (self.conditioned or self.stationary):
            cap = int(min(max(10 * vector.size(x0), 100), cap))
        return Budget(iterations=cap, rtol=default_tolerance(x0))

    def check(self, problem: BoundProblem) -> None:
        """Refuse a problem that lacks what the solver requires.

        **Raises:** `IncompatibleError` naming what is missing and what to use instead; also
        for a preconditioner that says it is not symmetric, where it must be.
        """
        require_traits(type(self).__name__, self.requires)
        missing = sorted(name for name in self.requires if not has_trait(problem, name))
        if missing:
            reasons = "; ".join(_WHY[name] for name in missing)
            msg = (
                f"{type(self).__name__} cannot solve this {problem.name}: {reasons}. "
                f"Use {_instead(self, missing, problem)} instead."
            )
            raise IncompatibleError(msg)
        if "symmetric" in self.requires:
            _require_symmetric(self, problem)


def require_traits(owner: str, requires: Any) -> None:
    """Refuse traits that there are not."""
    if isinstance(requires, str):
        msg = f"{owner}: requires must be a set of names. Write frozenset({{{requires!r}}})."
        raise TypeError(msg)
    unknown = sorted(set(requires) - TRAITS)
    if unknown:
        meant = nearest(unknown[0], sorted(TRAITS))
        hint = "" if meant is None else f" Did you mean {meant!r}?"
        msg = (
            f"{owner}: requires names {unknown[0]!r}, which is no trait of a problem.{hint} The "
            f"traits are {', '.join(sorted(TRAITS))}."
        )
        raise TypeError(msg)


def _require_symmetric(solver: InnerSolver, problem: BoundProblem) -> None:
    """Refuse a preconditioner that says it is not symmetric, where it must be."""
    preconditioner: Any = getattr(solver, "preconditioner", None)
    if getattr(preconditioner, "symmetric", None) is not False:
        return
    name, kind = type(solver).__name__, type(preconditioner).__name__
    options = getattr(preconditioner, "__dataclass_fields__", {})
    given = f"{kind}(symmetric=True)" if "symmetric" in options else "a symmetric one"
    msg = (
        f"{name} needs a symmetric preconditioner, and {kind} says it is not "
        f"(symmetric=False). Use {given}, or a solver such as {suited(problem, without=name)}."
    )
    raise IncompatibleError(msg)


def _instead(solver: InnerSolver, missing: list[str], problem: BoundProblem) -> str:
    """What to use: another linear solver helps no problem that is not linear."""
    if solver.instead and "operator" not in missing:
        return solver.instead
    name = type(solver).__name__
    inside = solver.linear_adjoint and all(
        has_trait(problem, trait) for trait in solver.requires - {"operator"}
    )
    also = f", or Newton(linear={name}(...))," if inside and problem.operator is None else ""
    return suited(problem, without=name) + also


def suited(problem: BoundProblem, *, without: str = "") -> str:
    """Solvers of this package that accept a problem, the best first, as "A, B or C".

    >>> import bilevel as bl
    >>> suited(bl.FixedPoint(lambda x, theta: 0.5 * x).at(None), without="Anderson")
    'FixedPointIteration or Newton'
    """
    if problem.operator is not None:
        names = ["GMRES", "BiCGStab"] if problem.matrix_free else ["Direct", "GMRES", "BiCGStab"]
        if problem.symmetric:
            names = ["ConjugateGradient" if problem.positive_definite else "MINRES", *names]
    elif problem.proximal is not None:
        names = ["ProximalGradient", "Anderson"]
    elif problem.mapping is not None:
        names = ["Anderson", "FixedPointIteration", "Newton"]
    elif problem.objective is not None:
        names = ["LBFGS", "Newton", "ArmijoGradientDescent"]
    else:
        names = ["Newton", "Richardson"]
    chosen = [name for name in names if name != without][:3]
    return " or ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))


def default_tolerance(x: PyTree) -> float:
    """A relative tolerance that the dtype can reach: 4e-11 in float64, 2e-5 in float32."""
    return vector.epsilon(x) ** (2 / 3)


def has_trait(problem: BoundProblem, name: str) -> bool:
    """Whether the problem has the trait, counting unknown symmetry of a linear system as yes.

    A linear system whose symmetry nobody declared gets the benefit of the doubt: the
    true residual tells in the end.
    """
    declared: Any
    match name:
        case "symmetric" | "positive_definite":
            declared = getattr(problem, name)
            return declared is True or (declared is None and problem.operator is not None)
        case "diagonal":
            return problem.operator is not None and problem.operator.diagonal is not None
        case _:
            return getattr(problem, name) is not None


_WHY = {
    "objective": "it needs an objective to minimise, and there is only a residual",
    "mapping": "it needs a fixed-point mapping",
    "operator": "it needs a linear system",
    "symmetric": "its operator must be symmetric, and it is not declared so (symmetric=True)",
    "positive_definite": (
        "its operator must be symmetric positive definite, and it is not declared so "
        "(positive_definite=True)"
    ),
    "diagonal": (
        "it needs the operator's diagonal, and the operator has none (give a matrix, or an "
        "operator object with a diagonal method)"
    ),
    "proximal": "it needs a CompositeMinimization, with a proximal operator",
}

TRAITS = frozenset(_WHY)
"""What a solver may require of a problem."""
