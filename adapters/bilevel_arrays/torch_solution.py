"""A solution on torch's arrays, joined to autograd: its backward pass is an adjoint solve."""

import dataclasses
from typing import Any

import jax

from bilevel.solution import Solution
from bilevel_arrays.adjoint import trusted
from bilevel_arrays.guard import on_one_device
from bilevel_arrays.library import load
from bilevel_arrays.pullback import requires
from bilevel_arrays.solving import Setting

torch: Any = load("torch")


def attached(setting: Setting) -> Solution:
    """Solve, and attach the derivative with respect to the tensors of θ that require grad.

    **Raises:** `ValueError` where the problem captured a tensor that requires grad, which would
    get no gradient without a word.
    """
    leaves, treedef = jax.tree.flatten(setting.theta)
    still = jax.tree.unflatten(
        treedef, [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    )
    setting = dataclasses.replace(setting, theta=still)
    # Of copies: nothing has said yet that the functions do not write into them.
    theta, x0 = jax.tree.map(_copy, (still, setting.x0))
    with on_one_device(type(setting.problem).__name__, setting.space):
        outcome = setting.problem.evaluated(theta, x0, setting.space)
    if any(map(requires, jax.tree.leaves(outcome))):
        msg = (
            f"{type(setting.problem).__name__}: it captured a tensor that requires grad, such as "
            "the parameters of a module, and only theta is differentiated: its gradient would be "
            "missing without a word. Pass it in theta (of a module, dict(module.named_parameters())"
            " and torch.func.functional_call), or detach it."
        )
        raise ValueError(msg)
    if not any(map(requires, leaves)):
        return setting.primal()
    solved: list[Solution] = []
    outputs = _Node.apply(setting, solved, *leaves)
    structure = jax.tree.structure(setting.x0)
    return dataclasses.replace(solved[0], value=jax.tree.unflatten(structure, list(outputs)))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


class _Node(torch.autograd.Function):
    """A solve as a node of torch's graph."""

    @staticmethod
    def forward(context: Any, setting: Setting, solved: list[Solution], *leaves: Any) -> Any:
        """The primal solve."""
        solution = setting.primal()
        solved.append(solution)
        context.setting, context.solution = setting, solution
        # An iterate may be the start itself, which torch would take for a view.
        value = [leaf.clone() for leaf in jax.tree.leaves(solution.value)]
        # Torch sees to it that nobody writes into θ before the backward pass.
        context.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))
        return tuple(value)

    @staticmethod
    def backward(context: Any, *cotangents: Any) -> tuple[Any, ...]:
        """The adjoint solve."""
        if torch.is_grad_enabled():
            msg = (
                "bilevel_arrays.solve: there is no second derivative. Leave create_graph out; or "
                "write the problem in JAX and call it by bilevel_arrays.torch.function, which has "
                "them."
            )
            raise RuntimeError(msg)
        _ = context.saved_tensors  # asks whether they are as they were
        setting, primal = context.setting, context.solution
        cotangent = jax.tree.unflatten(jax.tree.structure(setting.x0), list(cotangents))
        adjoint, found = setting.pulled(primal, cotangent)
        found = trusted(found, primal, adjoint)
        gradients = jax.tree.leaves(found, is_leaf=lambda leaf: leaf is None)
        return (None, None, *gradients)
