"""Choice: settings that go to a library, as a hashable part of a solver."""

import warnings
from collections.abc import Callable
from typing import Any


def frozen(
    owner: str, options: dict[str, Any], *, taken: tuple[str, ...] = ()
) -> tuple[tuple[str, Any], ...]:
    """Options, sorted and hashable.

    **Arguments:**

    - `taken`: those that the budget decides.

    **Raises:** `ValueError` for one of these, `TypeError` for a value that is not hashable.

    >>> frozen("scipy_minimize", {"maxcor": 20, "eps": 1e-8})
    (('eps', 1e-08), ('maxcor', 20))
    """
    for name in taken:
        if name in options:
            msg = (
                f"{owner}: {name} is what the budget decides. Leave it out, and give bl.solve "
                "budget=bl.Budget(iterations=..., rtol=...)."
            )
            raise ValueError(msg)
    kept = tuple(sorted(options.items()))
    try:
        hash(kept)
    except TypeError:
        msg = f"{owner}: options must be hashable, got {options!r}. Write tuples for lists."
        raise TypeError(msg) from None
    return kept


def thawed(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The options by name.

    >>> thawed((("maxcor", 20),))
    {'maxcor': 20}
    """
    return dict(options)


def tried(owner: str, options: dict[str, Any], trial: Callable[[], object]) -> None:
    """Refuse options that a library does not know, by a run on next to nothing.

    **Arguments:**

    - `options`: for the message.
    - `trial`: the run.

    **Raises:** `ValueError` with what the library says.

    >>> try:
    ...     tried("made", {"foo": 1}, lambda: dict.fromkeys([], foo=1))
    ... except ValueError as error:
    ...     print(error)
    made: foo is not among the options (dict.fromkeys() takes no keyword arguments).
    """
    if not options:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Unknown solver options")
        try:
            trial()
        except (TypeError, Warning) as error:
            named = ", ".join(options)
            verb = "is" if len(options) == 1 else "are"
            msg = f"{owner}: {named} {verb} not among the options ({str(error).rstrip('.')})."
            raise ValueError(msg) from None
        except Exception:  # noqa: BLE001, S110
            pass  # of so small a problem: the options are known
