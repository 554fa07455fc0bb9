"""Choice: settings that go to a library, as a hashable part of a solver."""

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
