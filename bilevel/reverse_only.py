"""A mark on numbers that only reverse mode can differentiate: forward mode says why."""

from typing import Any, Never, TypeVar

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

T = TypeVar("T")


class ForwardModeError(TypeError):
    """Forward-mode differentiation of what has reverse mode only."""


def reverse_only(tree: T, message: str) -> T:
    """The tree itself; forward-mode differentiation through it raises `message`.

    Without it, JAX would complain of a custom rule that the user has not written. Forward
    mode over reverse mode (`jax.hessian`) goes through.

    >>> import jax
    >>> float(jax.grad(lambda x: reverse_only(x, "reverse mode only"))(1.0))
    1.0
    >>> try:
    ...     jax.jvp(lambda x: reverse_only(x, "reverse mode only"), (1.0,), (2.0,))
    ... except TypeError as error:
    ...     print(error)
    reverse mode only
    """

    def marked(leaf: Any) -> Any:
        return _marked.bind(leaf, message=message) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(marked, tree)


def has_reverse_only(error: TypeError) -> bool:
    """Whether an error says that there is reverse mode only: ours, or JAX's of a custom rule."""
    return isinstance(error, ForwardModeError) or "custom_vjp" in str(error)


_marked = Primitive("reverse_only")
_tangent = Primitive("reverse_only_tangent")


def _derivative(primals: Any, tangents: Any, *, message: str) -> Any:
    (leaf,), (tangent,) = primals, tangents
    # The mark has done its work: forward mode over this derivative meets none.
    if isinstance(tangent, ad.Zero):
        return leaf, tangent
    # With the leaf beside it, for what happens to either of them.
    return leaf, _tangent.bind(tangent, leaf, message=message)


def _refuse(*_: Any, message: str) -> Never:
    raise ForwardModeError(message)


def _transpose(cotangent: Any, tangent: Any, leaf: Any, *, message: str) -> tuple[Any, None]:
    del tangent, leaf, message
    return cotangent, None


def _batch(leaves: Any, axes: Any, *, message: str) -> Any:
    return _marked.bind(*leaves, message=message), axes[0]


def _same(leaf: Any, *_: Any, message: str) -> Any:
    del message
    return leaf


_marked.def_impl(_same)
_marked.def_abstract_eval(_same)
batching.primitive_batchers[_marked] = _batch
mlir.register_lowering(_marked, lambda _context, leaf, *, message: [leaf])  # noqa: ARG005
ad.primitive_jvps[_marked] = _derivative

# Reverse mode records the tangent and transposes it; whoever does more with it wants forward
# mode, and the custom rule behind the mark would refuse that in words of its own.
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(_same)
ad.primitive_transposes[_tangent] = _transpose
ad.primitive_jvps[_tangent] = batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)
