"""What a user's own methods do wrong before any property can be looked at."""

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bilevel.bound import BoundProblem
from bilevel.context import advice_on, place_of
from bilevel.solver.base import TRAITS, InnerSolver, has_trait
from bilevel.testing.conformance import Checklist, ConformanceError

TRACED = "same under jit"
"""The property that code which cannot be traced does not have."""

_LONGEST = 200


def require_instance(owner: str, name: str, value: object, kind: type) -> None:
    """Refuse a class where an instance is wanted, and whatever is of another kind.

    **Raises:** `TypeError`.
    """
    if isinstance(value, type):
        msg = (
            f"{owner}: {name} must be an instance, got the class {value.__name__}. Write "
            f"{value.__name__}(...)."
        )
        raise TypeError(msg)
    if not isinstance(value, kind):
        msg = (
            f"{owner}: {name} must be of a class derived from bl.{kind.__name__}, got "
            f"{type(value).__name__}. The arguments are {owner}({name}, problem, theta, x0)."
        )
        raise TypeError(msg)


def require_order(owner: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Refuse a method that takes the arguments it is called with in another order.

    Their names tell: `init(self, x, problem)` is called with the problem first.

    **Raises:** `TypeError`.
    """
    try:
        taken = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in, or C
        return
    places = [taken.index(name) for name in expected if name in taken]
    if places == sorted(places):
        return
    msg = (
        f"{owner} takes ({', '.join(taken)}), but is called with ({', '.join(expected)}) by "
        f"position. Exchange them: def {owner.rpartition('.')[2]}(self, {', '.join(expected)})."
    )
    raise TypeError(msg)


def called(
    checklist: Checklist, name: str, method: str, function: Callable[..., Any], *arguments: Any
) -> Any:
    """What a method of the user's returns; what it raises becomes a property that is broken.

    **Arguments:**

    - `name`: of the property that does not hold where it raises or returns nothing.
    - `method`: what is called, for the message.

    **Raises:** `ConformanceError`.
    """
    try:
        outcome = function(*arguments)
    except ConformanceError:
        raise
    except Exception as error:  # noqa: BLE001
        fail_by(checklist, name, method, error)
    else:
        if outcome is None:
            advice = f"Write return ... at the end of {method}."
            checklist.fail(name, f"{method} to return something", "None", advice)
        return outcome


def fail_by(
    checklist: Checklist, name: str, method: str, error: Exception, advice: str = ""
) -> None:
    """Say that a property does not hold because of an error: which, where, and what helps.

    **Raises:** `ConformanceError`, always.
    """
    place, found = place_of(error), f"{type(error).__name__}"
    got = f"{found} {place}" if place else found
    help_with_tracing = advice_on(error)
    if help_with_tracing:
        checklist.fail(TRACED, f"{method} to be traceable", got, help_with_tracing)
    text = str(error).strip().partition("\n")[0][:_LONGEST]
    generic = "Correct what it computes there."
    checklist.fail(name, f"{method} to run", f"{got}: {text}", advice or generic)


def undeclared(solver: InnerSolver, problem: BoundProblem) -> str:
    """Advice where a solver uses what the problem lacks and `requires` does not declare."""
    used = set(_names_in(type(solver)))
    lacking = sorted(
        trait
        for trait in TRAITS - set(solver.requires)
        if trait in used and not has_trait(problem, trait)
    )
    if not lacking:
        return ""
    name = type(solver).__name__
    return (
        f"{name} uses problem.{lacking[0]}, which this {problem.name} does not have. Declare "
        f"requires: ClassVar[frozenset[str]] = frozenset({{{', '.join(map(repr, lacking))}}}), and "
        "such problems are refused before anything runs."
    )


def _names_in(kind: type) -> Iterator[str]:
    """Names that the methods of a class look up, those of its own bases included."""
    for part in kind.__mro__:
        if part.__module__.startswith(("bilevel.", "equinox.")) or part is object:
            continue
        for member in vars(part).values():
            function: Any = inspect.unwrap(getattr(member, "method", member))
            if isinstance(function, types.FunctionType):
                yield from _names(function.__code__)


def _names(code: types.CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
