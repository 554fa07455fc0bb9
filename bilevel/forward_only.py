"""A mark on numbers that only forward mode can differentiate: reverse mode says why."""

from typing import Any, Never, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

T = TypeVar("T")


class ReverseModeError(TypeError):
    """Reverse-mode differentiation of what has forward mode only."""


def forward_only(tree: T, message: str) -> T:
    """The tree itself; reverse-mode differentiation through it raises `message`.

    Without it, JAX would complain of some loop deep inside that nobody has written.

    >>> import jax
    >>> float(jax.jvp(lambda x: forward_only(x, "forward mode only"), (1.0,), (2.0,))[1])
    2.0
    >>> try:
    ...     jax.grad(lambda x: forward_only(x, "forward mode only"))(1.0)
    ... except TypeError as error:
    ...     print(error)
    forward mode only
    """
    return jax.tree.map(lambda leaf: _marked.bind(leaf, message=message), tree)


def has_forward_only(error: TypeError | ValueError) -> bool:
    """Whether an error says that there is forward mode only: ours, or JAX's of a while loop."""
    return isinstance(error, ReverseModeError) or "everse-mode" in str(error)


_marked = Primitive("forward_only")


@_marked.def_impl
def _evaluate(leaf: Any, *, message: str) -> Any:
    del message
    return leaf


@_marked.def_abstract_eval
def _abstract(leaf: Any, *, message: str) -> Any:
    del message
    return leaf


def _transpose(cotangent: Any, leaf: Any, *, message: str) -> Never:
    del cotangent, leaf
    raise ReverseModeError(message)


def _batch(leaves: Any, axes: Any, *, message: str) -> Any:
    return _marked.bind(*leaves, message=message), axes[0]


ad.deflinear2(_marked, _transpose)
batching.primitive_batchers[_marked] = _batch
mlir.register_lowering(_marked, lambda _context, leaf, *, message: [leaf])  # noqa: ARG005
