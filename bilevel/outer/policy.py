"""Policies: how a controller is named on a command line or in a comparison."""

import dataclasses
from collections.abc import Callable

from bilevel.outer.suggestion import did_you_mean

SYNTAX = {
    "full": "full",
    "fixed": "fixed=K or fixed=K:M",
    "best-fixed": "best-fixed or best-fixed=RUNS",
    "schedule": "schedule=linear:STEP or schedule=iterations:STEP",
    "hoag": "hoag=exponential|quadratic|cubic",
    "prdp": "prdp",
    "error": "error",
    "auto": "auto",
    "task": "task",
}
"""How each kind of policy is written."""

MEANING = {
    "full": "the full solve in every step",
    "fixed": "K primal and M adjoint iterations (M = K by default) in every step",
    "best-fixed": "the cheapest constant level of the ladder that ends where full ends but for "
    "the margin, searched among RUNS levels (default 8)",
    "schedule": "STEP levels up the ladder every epoch, or STEP iterations more",
    "hoag": "tolerances that fall by HOAG's sequences, 1e-3 at the start",
    "prdp": "progressive refinement by the published rule",
    "error": "the hypergradient's error is held below its norm, primal and adjoint apart",
    "auto": "nothing to set: gradients compared at several levels now and then",
    "task": "the controller that the task brings",
}
"""What each kind of policy does."""

_SEQUENCES = ("exponential", "quadratic", "cubic")


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy as written, taken apart.

    - `text`: as written; the name in tables.
    - `kind`: one of `SYNTAX`.
    - `numbers`: its whole numbers: (K, M), (RUNS,) or (STEP,).
    - `sequence`: of HOAG; `iterations` of a schedule that counts them.
    """

    text: str
    kind: str
    numbers: tuple[int, ...] = ()
    sequence: str | None = None

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.text)


def parse_policy(written: str) -> Policy:
    """Take a policy apart.

    **Arguments:**

    - `written`: one of `full`, `fixed=K`, `fixed=K:M`, `best-fixed`, `best-fixed=RUNS`,
        `schedule=linear:STEP`, `schedule=iterations:STEP`, `hoag=exponential|quadratic|cubic`,
        `prdp`, `error`, `auto`, `task`.

    **Raises:** `ValueError` in one line, with the nearest known name.

    >>> parse_policy("fixed=25:100").numbers
    (25, 100)
    >>> parse_policy("prpd")
    Traceback (most recent call last):
    ...
    ValueError: policy 'prpd' is unknown; did you mean prdp?
    """
    written = written.strip()
    kind, separator, argument = written.partition("=")
    if kind not in SYNTAX:
        msg = f"policy {written!r} is unknown{did_you_mean(kind, SYNTAX)}"
        raise ValueError(msg)
    parser = _PARSERS.get(kind)
    if parser is None:
        if separator:
            raise ValueError(_wrong(written, kind, "it takes no value"))
        return Policy(written, kind)
    if not argument and (separator or kind != "best-fixed"):
        raise ValueError(_wrong(written, kind, "its value is missing"))
    return parser(written, argument)


def parse_policies(written: str) -> tuple[Policy, ...]:
    """Take a comma-separated list of policies apart.

    **Raises:** `ValueError` for an unknown, repeated or missing policy.

    >>> [policy.kind for policy in parse_policies("full,prdp")]
    ['full', 'prdp']
    """
    policies = tuple(parse_policy(part) for part in written.split(",") if part.strip())
    if not policies:
        msg = "no policy given; write for example full,prdp."
        raise ValueError(msg)
    names = [policy.text for policy in policies]
    for name in names:
        if names.count(name) > 1:
            msg = f"policy {name!r} is given twice."
            raise ValueError(msg)
    return policies


def _fixed(written: str, argument: str) -> Policy:
    first, separator, second = argument.partition(":")
    primal = _whole(written, "fixed", first)
    adjoint = _whole(written, "fixed", second) if separator else primal
    return Policy(written, "fixed", (primal, adjoint))


def _best_fixed(written: str, argument: str) -> Policy:
    runs = _whole(written, "best-fixed", argument) if argument else 8
    if runs < 3:
        raise ValueError(_wrong(written, "best-fixed", "a search needs at least 3 runs"))
    return Policy(written, "best-fixed", (runs,))


def _schedule(written: str, argument: str) -> Policy:
    shape, separator, step = argument.partition(":")
    if shape not in ("linear", "iterations"):
        raise ValueError(_wrong(written, "schedule", f"{shape!r} is no shape that there is"))
    if not separator:
        raise ValueError(_wrong(written, "schedule", "STEP is missing"))
    counted = "iterations" if shape == "iterations" else None
    return Policy(written, "schedule", (_whole(written, "schedule", step),), counted)


def _hoag(written: str, argument: str) -> Policy:
    if argument not in _SEQUENCES:
        hint = did_you_mean(argument, _SEQUENCES)
        msg = f"policy {written!r}: there is no sequence {argument!r}{hint}"
        raise ValueError(msg)
    return Policy(written, "hoag", sequence=argument)


def _whole(written: str, kind: str, number: str) -> int:
    # int() takes signs, blanks and underscores, which nobody means here.
    if not number.isdecimal() or int(number) < 1:
        why = f"{number!r} is no whole number of 1 or more"
        raise ValueError(_wrong(written, kind, why))
    return int(number)


def _wrong(written: str, kind: str, why: str) -> str:
    return f"policy {written!r}: {why}; write {SYNTAX[kind]}."


_PARSERS: dict[str, Callable[[str, str], Policy]] = {
    "fixed": _fixed,
    "best-fixed": _best_fixed,
    "schedule": _schedule,
    "hoag": _hoag,
}
