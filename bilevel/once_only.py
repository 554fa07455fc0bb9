"""A mark on numbers that can be differentiated once: a second time says why not."""

from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

T = TypeVar("T")


class SecondDerivativeError(TypeError):
    """A second derivative of what has a first one only."""


def once_only(tree: T, message: str) -> T:
    """The tree itself; a second derivative through it, in any mode, raises `message`.

    A rule whose derivative is an approximation has no derivative worth having: that of the
    approximation is another thing than the second derivative, and looks like one.

    >>> import jax
    >>> square = lambda x: once_only(x, "one derivative only") ** 2
    >>> float(jax.grad(square)(3.0)), float(jax.jvp(square, (3.0,), (1.0,))[1])
    (6.0, 6.0)
    >>> try:
    ...     jax.hessian(square)(3.0)
    ... except TypeError as error:
    ...     print(error)
    one derivative only
    """

    def marked(leaf: Any) -> Any:
        return _marked.bind(leaf, message=message) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(marked, tree)


_marked = Primitive("once_only")
_tangent = Primitive("once_only_tangent")


def _derivative(primals: Any, tangents: Any, *, message: str) -> Any:
    (leaf,), (tangent,) = primals, tangents
    if isinstance(tangent, ad.Zero):
        return leaf, tangent
    # With the leaf beside it: a derivative of this with respect to the leaf is a second one.
    return leaf, _tangent.bind(tangent, leaf, message=message)


def _second(primals: Any, tangents: Any, *, message: str) -> Any:
    (tangent, leaf), (change, movement) = primals, tangents
    if not isinstance(movement, ad.Zero):
        raise SecondDerivativeError(message)
    out = _tangent.bind(tangent, leaf, message=message)
    if isinstance(change, ad.Zero):
        return out, change
    return out, _tangent.bind(change, leaf, message=message)


def _transpose(cotangent: Any, tangent: Any, leaf: Any, *, message: str) -> tuple[Any, None]:
    del tangent
    if isinstance(cotangent, ad.Zero):
        return cotangent, None
    return _tangent.bind(cotangent, leaf, message=message), None


def _same(leaf: Any, *_: Any, message: str) -> Any:
    del message
    return leaf


def _batch(leaves: Any, axes: Any, *, message: str) -> Any:
    return _marked.bind(*leaves, message=message), axes[0]


def _batch_tangent(leaves: Any, axes: Any, *, message: str) -> Any:
    # The leaf is there to be looked at only, so its shape is of no account.
    return _tangent.bind(*leaves, message=message), axes[0]


for _primitive in (_marked, _tangent):
    _primitive.def_impl(_same)
    _primitive.def_abstract_eval(_same)
    mlir.register_lowering(_primitive, lambda _context, leaf, *_, message: [leaf])  # noqa: ARG005
batching.primitive_batchers[_marked] = _batch
batching.primitive_batchers[_tangent] = _batch_tangent
ad.primitive_jvps[_marked] = _derivative
ad.primitive_jvps[_tangent] = _second
ad.primitive_transposes[_tangent] = _transpose
