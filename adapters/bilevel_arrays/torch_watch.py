"""Watch: a user's function in torch, looked at for what makes its numbers or derivatives wrong."""

import contextlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from bilevel_arrays.library import load

torch: Any = load("torch")

_READERS = (torch.Tensor.tolist,)
"""What reads numbers without an operation that a dispatcher would see."""


@contextmanager
def watched(what: str, written: str, arguments: Sequence[Any]) -> Generator[None]:
    """Refuse, while a function is called, what a solver cannot live with.

    That is to read a number out of a tensor (the device would be waited for in every iteration,
    and the derivative through that number would be missing without a word), to write into an
    argument or into a tensor from outside, to draw random numbers, and to move numbers to
    another device.

    **Arguments:**

    - `what`: the function, for messages. `written`: of one that writes into an argument.
    - `arguments`: its tensors.

    **Raises:** `TypeError` or `ValueError` within.
    """
    with _Reads(what), _Operations(what, written, arguments), _waits(what, arguments):
        yield


class _Reads(torch.overrides.TorchFunctionMode):
    """Refuses the methods that read numbers."""

    def __init__(self, what: str):
        super().__init__()
        self._what = what

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _READERS:
            raise TypeError(_reads(self._what))
        return function(*args, **(kwargs or {}))


class _Operations(torch.utils._python_dispatch.TorchDispatchMode):  # noqa: SLF001
    """Refuses operations, each of which is seen here."""

    def __init__(self, what: str, written: str, arguments: Sequence[Any]):
        super().__init__()
        self._what, self._written = what, written
        self._arguments = {_memory(tensor) for tensor in arguments}
        self._own: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._check(function, args, kwargs)
        outcome = function(*args, **kwargs)
        seen = {_memory(leaf) for leaf in _tensors((args, kwargs))}
        # What is no view of something else is the function's own, to do with as it likes.
        self._own |= {_memory(leaf) for leaf in _tensors(outcome)} - seen
        return outcome

    def _check(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if function is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001
            raise TypeError(_reads(self._what))
        if torch.Tag.nondeterministic_seeded in function.tags and kwargs.get("generator") is None:
            msg = (
                f"{self._what} draws random numbers ({function}), so that it is another function "
                "at every call. Draw them before and pass them in theta; of a module with dropout "
                "take .eval()."
            )
            raise TypeError(msg)
        device = kwargs.get("device")
        for leaf in _tensors(args):
            if device is not None and leaf.device != torch.device(device) and leaf.numel() > 0:
                msg = (
                    f"{self._what} moves a tensor from {leaf.device} to {device}, which would be "
                    "done in every iteration. Have all of its tensors on one device before."
                )
                raise TypeError(msg)
        for tensor in _written_by(function, args, kwargs):
            place = _memory(tensor)
            if place in self._arguments and place:
                raise ValueError(self._written)
            if place not in self._own and place:
                msg = (
                    f"{self._what} writes into a tensor from outside ({function}), such as a "
                    "buffer of a module. The solver calls it as often as it needs to, so that what "
                    "it returns would depend on that. Of a module with batch normalisation take "
                    ".eval(); keep counters elsewhere."
                )
                raise ValueError(msg)


def _written_by(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operation writes into."""
    found: list[Any] = []
    for place, argument in enumerate(function._schema.arguments):  # noqa: SLF001
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


def _tensors(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: Any) -> int:
    """Where its numbers lie; 0 for nowhere."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return 0
    return int(tensor.untyped_storage().data_ptr())


def _reads(what: str) -> str:
    return (
        f"{what} reads a number out of a tensor (.item(), .tolist(), float(), bool(), or an if on "
        "a tensor). It would wait for the device in every iteration, and no derivative goes "
        "through that number. Use tensor operations such as torch.where, or give the number as a "
        "Python float."
    )


@contextmanager
def _waits(what: str, arguments: Sequence[Any]) -> Generator[None]:
    """On a GPU, whatever else waits for the device, as torch itself knows it."""
    if not any(tensor.is_cuda for tensor in arguments):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" in str(error):
            msg = (
                f"{what} waits for the device ({error}), and would in every iteration. Leave out "
                "what depends on how many numbers there are, such as nonzero and boolean masks."
            )
            raise TypeError(msg) from error
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            torch.cuda.set_sync_debug_mode(before)
