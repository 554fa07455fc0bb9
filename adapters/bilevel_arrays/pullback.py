"""Pullbacks: what an adjoint needs of a problem, from torch's autograd or from the user."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from bilevel_arrays.library import load
from bilevel_arrays.space import Space, compat


@dataclasses.dataclass(frozen=True)
class Pullback:
    """At one iterate and θ: v -> vᵀ∂ₓ and v -> vᵀ∂_θ of a function of both.

    What belongs to a leaf of θ that is no floating-point array, or that nothing reads, is `None`.
    """

    of_x: Callable[[PyTree], PyTree]
    of_theta: Callable[[PyTree], PyTree]


def by_user(
    owner: str, vjp: Callable[..., Any], x: PyTree, theta: PyTree, space: Space
) -> Pullback:
    """From `vjp(x, theta, v)`, which returns a pair, like x and like theta."""
    of_theta = f"{owner}: the part of vjp(x, theta, v) for theta"

    def checked(v: PyTree) -> tuple[PyTree, PyTree]:
        outcome = vjp(x, theta, v)
        if not (isinstance(outcome, tuple) and len(outcome) == 2):
            msg = (
                f"{owner}: vjp(x, theta, v) must return a pair, like x and like theta, got "
                f"{type(outcome).__name__}."
            )
            raise TypeError(msg)
        space.require_like(f"{owner}: the first part of vjp(x, theta, v)", outcome[0])
        return outcome

    return Pullback(lambda v: checked(v)[0], lambda v: like_theta(of_theta, theta, checked(v)[1]))


def by_torch(
    owner: str, function: Callable[[Any, Any], Any], x: PyTree, theta: PyTree, space: Space
) -> Pullback:
    """From torch's autograd, through one evaluation that is kept.

    **Raises:** `TypeError` where the space is not torch's, or autograd sees nothing.
    """
    if not space.is_torch:
        raise TypeError(no_derivative(owner, space))
    torch: Any = load("torch")
    x, moving = _tracked(x), _tracked(theta)
    with torch.enable_grad():
        outcome = _differentiated(owner, function, x, moving)
    outputs = jax.tree.leaves(outcome)
    seen = [place for place, leaf in enumerate(outputs) if leaf.requires_grad]

    def pulled(v: PyTree, inputs: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(inputs)
        wanted = [place for place, leaf in enumerate(leaves) if requires(leaf)]
        found: list[Any] = [None] * len(leaves)
        if wanted and seen:
            cotangents = jax.tree.leaves(v)
            gradients = torch.autograd.grad(
                [outputs[place] for place in seen],
                [leaves[place] for place in wanted],
                [cotangents[place] for place in seen],
                retain_graph=True,
                allow_unused=True,
            )
            for place, gradient in zip(wanted, gradients, strict=True):
                found[place] = gradient
        return jax.tree.unflatten(treedef, found)

    def of_x(v: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(x)
        found = jax.tree.leaves(pulled(v, x), is_leaf=lambda leaf: leaf is None)
        filled = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, found, strict=True)
        ]
        return jax.tree.unflatten(treedef, filled)

    return Pullback(of_x, lambda v: pulled(v, moving))


def gradient_by_torch(
    owner: str, objective: Callable[[Any, Any], Any], x: PyTree, theta: PyTree, *, graph: bool
) -> PyTree:
    """The gradient of a scalar function in x, like x; itself differentiable with `graph`."""
    torch: Any = load("torch")
    with torch.enable_grad():
        x = jax.tree.map(lambda leaf: leaf if graph else leaf.detach().requires_grad_(), x)
        value = _differentiated(owner, objective, x, theta)
        if not (isinstance(value, torch.Tensor) and value.ndim == 0):
            shape = tuple(getattr(value, "shape", ()))
            msg = (
                f"{owner} must return a real scalar, got shape {shape}. Sum over the samples, or "
                "take the mean."
            )
            raise TypeError(msg)
        if not value.requires_grad:
            raise TypeError(_unseen(owner))
        leaves, treedef = jax.tree.flatten(x)
        found = torch.autograd.grad(value, leaves, create_graph=graph, materialize_grads=True)
    return jax.tree.unflatten(treedef, list(found))


def requires(leaf: Any) -> bool:
    """Whether a leaf is a tensor that requires grad."""
    return bool(compat.is_torch_array(leaf)) and leaf.requires_grad


def no_derivative(owner: str, space: Space) -> str:
    """What to do where there is no derivative to be had."""
    return (
        f"{owner}: arrays of {space.xp.__name__} have no automatic derivatives. Give "
        "vjp=(x, theta, v) -> (like x, like theta), the products of v with the derivatives; or "
        "write the problem in PyTorch, or in JAX for bl.solve."
    )


def _tracked(tree: PyTree) -> PyTree:
    """The tree with floating-point tensors that autograd follows."""

    def track(leaf: Any) -> Any:
        if compat.is_torch_array(leaf) and leaf.is_floating_point():
            return leaf.detach().requires_grad_()
        return leaf

    return jax.tree.map(track, tree)


def _differentiated(owner: str, function: Callable[..., Any], x: PyTree, theta: PyTree) -> Any:
    try:
        return function(x, theta)
    except RuntimeError as error:
        if "Can't call numpy()" in str(error):
            raise TypeError(_unseen(owner)) from error
        if "a leaf Variable that requires grad is being used in an in-place" in str(error):
            msg = f"{owner} writes into its argument. Compute a new tensor."
            raise ValueError(msg) from error
        raise


def _unseen(owner: str) -> str:
    return (
        f"{owner}: torch's autograd sees no derivative of it: something leaves torch inside "
        "(.detach(), .numpy(), torch.no_grad(), a number). Compute in tensors throughout, or give "
        "the derivatives yourself."
    )


def like_theta(what: str, theta: PyTree, found: PyTree) -> PyTree:
    """What a user gave for θ, where it is like θ; `None` may stand for any leaf.

    **Raises:** `TypeError` naming the leaf that is not.
    """
    expected = jax.tree.structure(theta)
    got = jax.tree.structure(found, is_leaf=lambda leaf: leaf is None)
    if expected not in {got, jax.tree.structure(found)}:
        msg = f"{what} must have the structure of theta, {expected}, got {got}."
        raise TypeError(msg)
    values = jax.tree.leaves(found, is_leaf=lambda leaf: leaf is None)
    for (path, leaf), value in zip(
        jax.tree_util.tree_leaves_with_path(theta), values, strict=False
    ):
        shapes = [tuple(getattr(part, "shape", ())) for part in (leaf, value)]
        if value is not None and shapes[0] != shapes[1]:
            msg = (
                f"{what} at theta{jax.tree_util.keystr(path)} has shape {shapes[1]}, expected "
                f"{shapes[0]} as theta has."
            )
            raise TypeError(msg)
    return found
