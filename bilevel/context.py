"""Context: what was being evaluated when a user's function failed, and what it means."""

import contextlib
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

_LONGEST = 200
_PACKAGE = Path(__file__).parent

SCALARS_HINT = (
    "x0 is a list, which is a pytree of that many unknowns: write jnp.asarray(x0) for one vector."
)


@contextlib.contextmanager
def evaluating(what: str, **arguments: PyTree) -> Generator[None]:
    """Add a note to an error: what was evaluated, with which shapes, and what helps.

    >>> import jax.numpy as jnp
    >>> try:
    ...     with evaluating("objective(x, theta)", x=jnp.zeros(3), theta=jnp.zeros(4)):
    ...         jnp.zeros(3) - jnp.zeros(4)
    ... except TypeError as error:
    ...     print(*(note for note in error.__notes__ if "While" in note))
    While evaluating objective(x, theta) with x f32[3], theta f32[4].
    """
    try:
        yield
    except Exception as error:
        if not _is_noted(error):
            error.add_note(_described(what, arguments, error))
        raise


def advice_on(error: BaseException) -> str:
    """What helps against an error of tracing; empty for any other."""
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return (
            "A Python if, while, and, or cannot look at traced values: use jnp.where, jax.lax.cond "
            "or jax.lax.while_loop."
        )
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return (
            "NumPy and SciPy cannot compute with traced values: use jax.numpy, and "
            "bilevel_pde.from_scipy(matrix) for a product with a SciPy matrix."
        )
    if isinstance(error, jax.errors.ConcretizationTypeError):
        return "float(), int(), shapes and counts need values, and these are traced: use jax.numpy."
    return ""


def place_of(error: BaseException) -> str:
    """The innermost line of the traceback that is the user's: "in residual (file.py, line 3)"."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if not installed and _PACKAGE not in path.parents and not frame.filename.startswith("<"):
            return f"in {frame.name} ({path.name}, line {frame.lineno})"
    return ""


def shapes_of(tree: PyTree) -> str:
    """Shapes and dtypes in a line, such as f32[3].

    >>> import jax.numpy as jnp
    >>> shapes_of({"a": jnp.zeros(3), "b": 1.0})
    "{'a': f32[3], 'b': 1.0}"
    """
    text = " ".join(eqx.tree_pformat(tree, width=10_000, struct_as_array=True).split())
    text = text.replace("weak_", "")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def is_list_of_scalars(x: PyTree) -> bool:
    """Whether a list of numbers was given where an array was most likely meant."""
    return isinstance(x, list) and all(getattr(leaf, "shape", None) == () for leaf in x)


def _described(what: str, arguments: dict[str, Any], error: BaseException) -> str:
    shapes = ", ".join(f"{name} {shapes_of(value)}" for name, value in arguments.items())
    parts = [f"While evaluating {what} with {shapes}."]
    advice = advice_on(error)
    if advice:
        place = place_of(error)
        parts.append(f"It came up {place}. {advice}" if place else advice)
    if any(is_list_of_scalars(value) for value in arguments.values()):
        parts.append(SCALARS_HINT)
    return " ".join(parts)


def _is_noted(error: BaseException) -> bool:
    return any("While evaluating " in note for note in getattr(error, "__notes__", ()))
