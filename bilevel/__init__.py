"""bilevel: optimise through inner problems that an iterative solver solves to a budget.

The public names stand in `__init__.pyi`, a line each, and are imported when they are first
used, so that the command line starts without JAX.
"""

import lazy_loader

__version__ = "0.1.0"

_imported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """A public name, imported; the nearest one is suggested for a name that is none."""
    try:
        return _imported(name)
    except AttributeError:
        if name in __all__:  # the module that should have it is at fault
            raise
    msg = f"module {__name__!r} has no attribute {name!r}{'' if name[:1] == '_' else _near(name)}"
    raise AttributeError(msg)


def _near(name: str) -> str:
    import difflib  # noqa: PLC0415

    known = {known.lower(): known for known in __all__}
    # CG, GD, FPI: capitals of a name.
    short = [known for known in __all__ if "".join(filter(str.isupper, known)) == name.upper()]
    spelled = [known[key] for key in difflib.get_close_matches(name.lower(), known, n=1)]
    found = (short or spelled) if name.isupper() else (spelled or short)
    if not found:
        return "; dir(bilevel) lists what there is"
    return f"; did you mean {' or '.join(found)}?"
