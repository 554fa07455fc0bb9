"""Exchange: tensors as JAX arrays and back, by DLPack, on the device where they are."""

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.dlpack
from jaxtyping import Array

from bilevel_arrays.library import load

torch: Any = load("torch")


def as_array(tensor: Any) -> Array:
    """A tensor as a JAX array of the same device, in the same memory where that is possible.

    It is not for what JAX has no layout for (a stride that leaves elements out, an expanded
    axis, a lazy conjugate) nor, on the CPU, for memory that does not start at a multiple of 64
    bytes, as that of a slice: these are copied on their device.
    """
    # What is on the way to the device belongs to torch's stream, and DLPack lets JAX wait for it.
    return jax.dlpack.from_dlpack(_plain(tensor))


def as_input(tensor: Any) -> Any:
    """A tensor as something that a compiled program takes, in the same memory as by `as_array`.

    Where the program runs on the CPU that is NumPy's view of it, at a quarter of what DLPack
    costs.
    """
    if tensor.is_cpu and tensor.dtype in _NUMPY and _runs_on_cpu():
        return _plain(tensor).numpy()
    return as_array(tensor)


def _plain(tensor: Any) -> Any:
    """The tensor without gaps, lazy conjugates and its place in a graph."""
    tensor = tensor.detach()
    if tensor.is_complex() and tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _runs_on_cpu() -> bool:
    """Whether a program that is given NumPy's arrays runs on the CPU."""
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return device is None and _default_backend() == "cpu"


@functools.cache
def _default_backend() -> str:
    return jax.default_backend()


def as_tensor(array: Array) -> Any:
    """A JAX array as a tensor in the same memory; torch's current stream waits for it.

    **Raises:** `TypeError` for an array that is no array of numbers.
    """
    try:
        device: Any = array.device
        if device.platform == "cpu":
            return torch.utils.dlpack.from_dlpack(array.__dlpack__())
        return torch.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        msg = (
            f"the function returned an array of {array.dtype}, which no tensor can hold: {error}. "
            "Convert it first, such as .astype(jnp.int32), or jax.random.key_data(key)."
        )
        raise TypeError(msg) from None


def wait(arrays: Any, tensors: Sequence[Any]) -> None:
    """Wait for what runs on the CPU, where there is no stream that could wait.

    Afterwards nobody reads the inputs any more, and torch may write into them.

    **Arguments:**

    - `arrays`: what a program returned; `tensors`: some that it was called with.
    """
    if not tensors or tensors[0].is_cpu:
        for array in jax.tree.leaves(arrays):
            array.block_until_ready()


def double_precision() -> bool:
    """Whether JAX computes in double precision here and now."""
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


def in_precision(*, double: bool) -> AbstractContextManager[Any]:
    """JAX's precision for a while, where it is another one."""
    return contextlib.nullcontext() if double_precision() == double else jax.enable_x64(double)


def supports(device: Any) -> bool:
    """Whether JAX can use a device of torch."""
    platform = {"cpu": "cpu", "cuda": "gpu", "xpu": "gpu"}.get(device.type)
    if platform is None:
        return False
    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


def wide(dtype: Any) -> bool:
    """Whether a dtype of torch has 64 bits a real number, which JAX halves by default."""
    return dtype in _WIDE


def precision(dtype: Any) -> Any:
    """The real dtype of a float or complex dtype of torch, `None` for any other."""
    if dtype.is_complex:
        return dtype.to_real()
    return dtype if dtype.is_floating_point else None


_NUMPY = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.complex128,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}
"""What NumPy has, too."""

_WIDE = {torch.float64, torch.complex128, torch.int64, torch.uint64}
