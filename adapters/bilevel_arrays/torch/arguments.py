"""Arguments: what a bridge was called with, sorted and checked."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_arrays.torch import exchange
from bilevel_arrays.torch.exchange import torch


class Sorted(NamedTuple):
    """The leaves of a call.

    - `treedef`: of (args, kwargs). `inputs`: tensors, arrays and numbers, in order.
    - `tensors`: which of the inputs are tensors. `static`: the other leaves, each with its place.
    """

    treedef: Any
    inputs: list[Any]
    tensors: tuple[int, ...]
    static: tuple[tuple[int, Any], ...]


class Arguments:
    """Sorts and checks the arguments of one function.

    **Arguments:**

    - `function`: whose they are, for their names.
    - `constant`: names of the parameters that are not differentiated.

    **Raises:** `ValueError` for a name that is no parameter.
    """

    def __init__(self, function: Callable[..., Any], constant: tuple[str, ...]):
        self._function = function
        self._constant = frozenset(constant)
        self.name = getattr(function, "__name__", type(function).__name__)
        try:
            self._parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # built in, or C
            self._parameters = []
        known = [parameter.name for parameter in self._parameters]
        for name in constant:
            if name not in known:
                msg = (
                    f"function: constant names {name!r}, and {self.name} takes "
                    f"({', '.join(known)}). Name parameters of the function."
                )
                raise ValueError(msg)
        self._constant_leaves = functools.lru_cache(maxsize=256)(self._find_constant)

    def sort(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sorted:
        """The leaves of a call, by what becomes of them.

        **Raises:** `TypeError` for tensors that do not go together or not into JAX.
        """
        leaves, treedef = jax.tree.flatten((args, kwargs))
        inputs: list[Any] = []
        tensors: list[int] = []
        static: list[tuple[int, Any]] = []
        first: tuple[int, Any] | None = None
        floating: tuple[int, Any] | None = None
        double = exchange.double_precision()
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                self._check(treedef, place, leaf, double=double)
                if first is None:
                    first = place, leaf
                elif leaf.device != first[1].device:
                    self._refuse_devices(treedef, first, (place, leaf))
                precision = exchange.precision(leaf.dtype)
                if precision is not None:
                    if floating is None:
                        floating = place, precision
                    elif precision != floating[1]:
                        self._refuse_precisions(treedef, floating, (place, precision))
                tensors.append(len(inputs))
                inputs.append(leaf)
            elif isinstance(leaf, jax.Array | np.ndarray | np.generic) or (
                isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)
            ):
                inputs.append(leaf)
            else:
                static.append((place, leaf))
        if first is not None:
            self._require_supported(treedef, first[0], first[1].device)
        if self._constant:
            self._check_constant(treedef, leaves, len(args))
        return Sorted(treedef, inputs, tuple(tensors), tuple(static))

    def where(self, treedef: Any, place: int) -> str:
        """What a leaf is called: "theta['a']"."""
        tree = jax.tree.unflatten(treedef, range(treedef.num_leaves))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if leaf == place:
                rest = jax.tree_util.keystr(path[2:])
                key = path[1]
                if isinstance(key, jax.tree_util.DictKey):
                    return f"{key.key}{rest}"
                return f"{self._positional(key.idx)}{rest}"
        return "an argument"

    def first_argument(self, sorted_: Sorted) -> tuple[int, ...]:
        """Of the inputs of the first argument, which of its leaves they are."""
        args, _ = jax.tree.unflatten(sorted_.treedef, range(sorted_.treedef.num_leaves))
        if not args:
            return ()
        static = {place for place, _ in sorted_.static}
        return tuple(place for place in jax.tree.leaves(args[0]) if place not in static)

    def _positional(self, index: int) -> str:
        if index < len(self._parameters):
            parameter = self._parameters[index]
            if parameter.kind is not parameter.VAR_POSITIONAL:
                return parameter.name
        return f"args[{index}]"

    def _check(self, treedef: Any, place: int, tensor: Any, *, double: bool) -> None:
        if tensor.layout != torch.strided:
            msg = (
                f"{self.name}: {self.where(treedef, place)} is a tensor of layout {tensor.layout}, "
                "and JAX takes dense ones. Pass .values() and the indices, or .to_dense(); "
                "bilevel_arrays.solve takes sparse tensors as operators."
            )
            raise TypeError(msg)
        if exchange.wide(tensor.dtype) and not double:
            narrow = {
                torch.float64: ".float()",
                torch.complex128: ".to(torch.complex64)",
                torch.int64: ".int()",
            }.get(tensor.dtype, ".to(torch.uint32)")
            msg = (
                f"{self.name}: {self.where(treedef, place)} is {tensor.dtype}, and JAX computes in "
                "32 bits here, so that it would be rounded without a word. Write "
                'jax.config.update("jax_enable_x64", True) at the start of the program, or pass '
                f"{narrow}."
            )
            raise TypeError(msg)

    def _require_supported(self, treedef: Any, place: int, device: Any) -> None:
        if not _supported(device):
            msg = (
                f"{self.name}: {self.where(treedef, place)} is on {device}, and JAX has no "
                f"such device here (it has {jax.default_backend()}). Install the build of JAX that "
                "fits, such as jax[cuda12], or move the tensors: .cpu()."
            )
            raise TypeError(msg)

    def _refuse_devices(self, treedef: Any, one: tuple[int, Any], other: tuple[int, Any]) -> None:
        msg = (
            f"{self.name}: {self.where(treedef, one[0])} is on {one[1].device} and "
            f"{self.where(treedef, other[0])} on {other[1].device}. Move all tensors to one device "
            f"first: .to({str(one[1].device)!r})."
        )
        raise TypeError(msg)

    def _refuse_precisions(
        self, treedef: Any, one: tuple[int, Any], other: tuple[int, Any]
    ) -> None:
        msg = (
            f"{self.name}: {self.where(treedef, one[0])} is of {one[1]} and "
            f"{self.where(treedef, other[0])} of {other[1]}, and which of them the solve should be "
            "in, nobody said. Convert one of them: .to(...)."
        )
        raise TypeError(msg)

    def _check_constant(self, treedef: Any, leaves: list[Any], count: int) -> None:
        for place in self._constant_leaves(treedef, count):
            leaf = leaves[place]
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                msg = (
                    f"{self.name}: {self.where(treedef, place)} requires grad, and it belongs to "
                    "an argument that was declared constant, so that its gradient would be missing "
                    "without a word. Pass .detach(), or take it out of constant=."
                )
                raise ValueError(msg)

    def _find_constant(self, treedef: Any, count: int) -> tuple[int, ...]:
        args, kwargs = jax.tree.unflatten(treedef, range(treedef.num_leaves))
        named = {self._positional(index): args[index] for index in range(count)} | kwargs
        extra = [p.name for p in self._parameters if p.kind is p.VAR_POSITIONAL]
        found = [tree for name, tree in named.items() if name in self._constant]
        if extra and extra[0] in self._constant:
            found += [tree for name, tree in named.items() if name.startswith("args[")]
        return tuple(jax.tree.leaves(found))


@functools.lru_cache(maxsize=64)
def _supported(device: Any) -> bool:
    return exchange.supports(device)
