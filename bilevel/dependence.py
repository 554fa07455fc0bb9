"""What a traced computation depends on."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

_CALLS = frozenset({"pjit", "jit", "closed_call", "core_call", "custom_jvp_call"})
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def depends(closed: core.ClosedJaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on the marked inputs.

    Calls (nested jit and the like) are looked into; any other equation with a dependent
    input makes all its outputs dependent, so that an answer of `False` is certain.
    """
    jaxpr = closed.jaxpr
    marked = {var for var, flag in zip(jaxpr.invars, inputs, strict=True) if flag}

    def is_marked(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and atom in marked

    for equation in jaxpr.eqns:
        flags = [is_marked(atom) for atom in equation.invars]
        if not any(flags):
            continue
        inner = _called(equation)
        if inner is not None and len(inner.jaxpr.invars) == len(flags):
            outputs = depends(inner, flags)
        else:
            outputs = [True] * len(equation.outvars)
        marked.update(var for var, flag in zip(equation.outvars, outputs, strict=True) if flag)
    return [is_marked(atom) for atom in jaxpr.outvars]


def reads(function: Callable[[Any], Any], argument: PyTree) -> bool:
    """Whether anything that a function returns depends on any leaf of its argument.

    What the function captured does not count, were it the very same array. A `False` is
    certain.

    >>> import jax.numpy as jnp
    >>> captured = jnp.ones(3)
    >>> reads(lambda theta: 2 * captured, captured), reads(lambda theta: 2 * theta, captured)
    (False, True)
    """
    closed = jax.make_jaxpr(lambda given: jax.tree.leaves(function(given)))(argument)
    return any(depends(closed, [True] * len(closed.jaxpr.invars)))


def is_affine(function: Callable[[Any], Any], x: PyTree) -> bool:
    """Whether a function of x is certainly affine, so that one linearisation serves all x.

    Looks at the program, not at values: a `False` may be too cautious, a `True` is
    certain.
    """

    def linearization_constants(x: Any) -> Any:
        _, derivative = jax.linearize(function, x)
        return jax.tree.leaves(derivative)

    closed = jax.make_jaxpr(linearization_constants)(x)
    return not any(depends(closed, [True] * len(closed.jaxpr.invars)))


def _called(equation: Any) -> core.ClosedJaxpr | None:
    if equation.primitive.name not in _CALLS:
        return None
    for name in _BODIES:
        inner = equation.params.get(name)
        if isinstance(inner, core.ClosedJaxpr):
            return inner
    return None
