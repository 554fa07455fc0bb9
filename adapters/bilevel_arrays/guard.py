"""Guard: a user's function, watched for what would make its numbers or its derivative wrong."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bilevel_arrays.library import load
from bilevel_arrays.space import Space, compat


class Guarded:
    """A function of a user's, called with arrays of one space.

    It must not write into its arguments, which the solver goes on to use: NumPy's are passed
    as read-only views, torch's versions are compared, the arrays of other libraries are
    compared with copies at the first call. And it must not read a number out of a tensor: the
    device would be waited for in every iteration, and the derivative through that number would
    be missing without a word. That is looked for at the first call.

    **Arguments:**

    - `owner`, `name`: for messages, such as "RootFinding" and "function(x, theta)".
    - `vector`: whether what it returns must be like the unknown; looked at at the first call.
    """

    def __init__(
        self,
        owner: str,
        name: str,
        function: Callable[..., Any],
        space: Space,
        *,
        vector: bool = False,
    ):
        self._what = f"{owner}: {name}"
        self._vector = vector
        self._function = function
        self._space = space
        self._known = False

    def __call__(self, *arguments: Any) -> Any:
        """The function's value.

        **Raises:** `ValueError` where it writes into an argument, `TypeError` where it reads a
        number out of a tensor.
        """
        first, self._known = not self._known, True
        outcome = self._watched(arguments, first=first)
        if first and self._vector:
            self._space.require_like(self._what, outcome)
        return outcome

    def _watched(self, arguments: tuple[Any, ...], *, first: bool) -> Any:
        if self._space.is_torch:
            return self._of_torch(arguments, first=first)
        if self._space.xp is compat.array_namespace(np.zeros(0)):
            return self._of_numpy(arguments)
        if not first:
            return self._function(*arguments)
        leaves = [leaf for leaf in jax.tree.leaves(arguments) if compat.is_array_api_obj(leaf)]
        copies = [self._space.xp.asarray(leaf, copy=True) for leaf in leaves]
        outcome = self._function(*arguments)
        for leaf, copy in zip(leaves, copies, strict=True):
            if not bool(self._space.xp.all((leaf == copy) | (leaf != leaf))):  # noqa: PLR0124, NaN
                raise ValueError(self._written())
        return outcome

    def _of_numpy(self, arguments: tuple[Any, ...]) -> Any:
        try:
            return self._function(*jax.tree.map(_read_only, arguments))
        except ValueError as error:
            if "read-only" in str(error):
                raise ValueError(self._written()) from error
            raise

    def _of_torch(self, arguments: tuple[Any, ...], *, first: bool) -> Any:
        torch: Any = load("torch")
        tensors = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, torch.Tensor)]
        before = [tensor._version for tensor in tensors]  # noqa: SLF001
        if first:
            with _watch(torch, self._what):
                outcome = self._function(*arguments)
        else:
            outcome = self._function(*arguments)
        if [tensor._version for tensor in tensors] != before:  # noqa: SLF001
            raise ValueError(self._written())
        return outcome

    def _written(self) -> str:
        return (
            f"{self._what} writes into its argument, which the solver goes on to use. Compute a "
            "new array: x = x + dx in place of x += dx, or start with a copy."
        )


def _read_only(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf
    view = leaf.view()
    view.flags.writeable = False
    return view


def _watch(torch: Any, what: str) -> Any:
    """A mode of torch that refuses to read a number out of a tensor."""
    return _mode(torch)(what)


@functools.cache
def _mode(torch: Any) -> Any:
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # noqa: SLF001
        def __init__(self, what: str):
            super().__init__()
            self.what = what

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001
                msg = (
                    f"{self.what} reads a number out of a tensor (.item(), float(), bool(), or an "
                    "if on a tensor). It would wait for the device in every iteration, and no "
                    "derivative goes through that number. Use tensor operations such as "
                    "torch.where, or give the number as a Python float."
                )
                raise TypeError(msg)
            return function(*args, **(kwargs or {}))

    return Watch
