"""Guard: a user's function, watched for what would make its numbers or its derivative wrong."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np

from bilevel_arrays.library import load
from bilevel_arrays.space import Space, compat


class Guarded:
    """A function of a user's, called with arrays of one space.

    It must not write into its arguments, which the solver goes on to use: NumPy's are passed
    as read-only views, torch's versions are compared, and at the first call the arrays of torch
    and of other libraries with copies. Of torch's functions the first call is watched, by
    `bilevel_arrays.torch_watch`.

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
        return self._compared(arguments, nullcontext())

    def _compared(self, arguments: tuple[Any, ...], watch: AbstractContextManager[Any]) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves(arguments) if _holds_numbers(leaf)]
        copies = [self._copy(leaf) for leaf in leaves]
        with watch:
            outcome = self._function(*arguments)
        for leaf, copy in zip(leaves, copies, strict=True):
            if not bool(self._space.xp.all((leaf == copy) | (leaf != leaf))):  # noqa: PLR0124, NaN
                raise ValueError(self._written())
        return outcome

    def _copy(self, leaf: Any) -> Any:
        leaf = leaf.detach() if self._space.is_torch else leaf
        return self._space.xp.asarray(leaf, copy=True)

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
            from bilevel_arrays.torch_watch import watched  # noqa: PLC0415, needs torch

            watch = watched(self._what, self._written(), tensors)
            with on_one_device(self._what, self._space):
                outcome = self._compared(arguments, watch)
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


@contextmanager
def on_one_device(what: str, space: Space) -> Generator[None]:
    """Say what is wrong where torch meets tensors on two devices.

    **Raises:** `TypeError`.
    """
    try:
        yield
    except RuntimeError as error:
        if "expected device" in str(error) or "same device" in str(error):
            msg = (
                f"{what}: its tensors are on two devices ({error}). x0 and theta are on "
                f"{space.device}: have what it captured there, too."
            )
            raise TypeError(msg) from error
        raise


def _read_only(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf
    view = leaf.view()
    view.flags.writeable = False
    return view


def _holds_numbers(leaf: Any) -> bool:
    """Whether it is a dense array with memory: others cannot be written into element by element."""
    if not compat.is_array_api_obj(leaf):
        return False
    dense = str(getattr(leaf, "layout", "torch.strided")) == "torch.strided"
    return dense and not getattr(leaf, "is_meta", False)
