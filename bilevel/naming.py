"""Names that were misspelt, and those that were meant."""

import difflib
import importlib
from collections.abc import Collection

_SHORT = {"cg": "ConjugateGradient", "gd": "GradientDescent", "picard": "FixedPointIteration"}


def no_argument(name: str, known: Collection[str]) -> str:
    """What to say of an argument that there is not.

    >>> no_argument("stepsize", ["step_size"])
    'no argument stepsize; did you mean step_size? There is step_size.'
    """
    meant = nearest(name, known)
    hint = "" if meant is None else f"; did you mean {meant}?"
    there = f"{'There' if hint else '; there'} is {', '.join(known)}."
    return f"no argument {name}{hint}{' ' if hint else ''}{there}"


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that another one most likely stands for, whatever its case.

    >>> nearest("l-bfgs", ["GMRES", "LBFGS"]), nearest("something", ["GMRES", "LBFGS"])
    ('LBFGS', None)
    """
    plain = {_plain(other): other for other in known}
    found = difflib.get_close_matches(_plain(name), plain, n=1)
    return plain[found[0]] if found else None


def public_name(name: str, kind: type) -> str | None:
    """The public class of a kind that a string most likely stands for.

    >>> import bilevel as bl
    >>> public_name("lbfgs", bl.InnerSolver), public_name("cg", bl.InnerSolver)
    ('LBFGS', 'ConjugateGradient')
    """
    package = importlib.import_module("bilevel")
    there: list[str] = [
        known
        for known in package.__all__
        if isinstance(thing := getattr(package, known), type)
        and issubclass(thing, kind)
        and thing is not kind
    ]
    short = _SHORT.get(_plain(name))
    return short if short in there else nearest(name, there)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
