"""Captured: tensors that a function of JAX reaches for while it is traced."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax

from bilevel_arrays.torch.exchange import torch

_ALLOWED = {torch.Tensor.detach, torch.Tensor.__repr__, torch.Tensor.__hash__, torch.Tensor.size}


@contextmanager
def looked_out_for(name: str) -> Generator[None]:
    """Refuse captured tensors that require grad, and torch's functions of JAX's arrays.

    **Arguments:**

    - `name`: of the function that is traced within, for messages.

    **Raises:** `ValueError` for a tensor whose gradient would be missing without a word,
    `TypeError` where JAX's arrays get into torch.
    """
    try:
        with _Captured(name):
            yield
    except TypeError as error:
        if "Tracer" in str(error) and "Tensor" in str(error):
            msg = (
                f"{name}: arrays of JAX and tensors of torch meet in it ({error}). It is a "
                "function of JAX: write it with jax.numpy, and pass tensors as arguments. Inner "
                "problems that are written in torch are for bilevel_arrays.solve."
            )
            raise TypeError(msg) from error
        raise


class _Captured(torch.overrides.TorchFunctionMode):
    """Sees whatever is asked of a tensor."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _ALLOWED and getattr(function, "__name__", "") != "__get__":
            for leaf in jax.tree.leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    msg = (
                        f"{self._name}: it captured a tensor that requires grad, of shape "
                        f"{tuple(leaf.shape)}, such as the parameters of a module: its gradient "
                        "would be missing without a word. Pass it as an argument, or .detach() it."
                    )
                    raise ValueError(msg)
        return function(*args, **kwargs)
