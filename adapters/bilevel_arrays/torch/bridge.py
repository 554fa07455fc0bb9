"""Bridge: one call of a JAX program as a node of torch's graph."""

import dataclasses
from typing import Any

import equinox as eqx
import jax

from bilevel_arrays.torch.exchange import (
    as_input,
    as_tensor,
    double_precision,
    in_precision,
    torch,
    wait,
)
from bilevel_arrays.torch.program import Outcome, Program
from bilevel_arrays.torch.report import Report


@dataclasses.dataclass
class Call:
    """One call of a program.

    - `inputs`: all of them, with `None` in the places of tensors.
    - `places`: of the tensors among the inputs, in order.
    - `probe`: zeros, or `None`. `report`: where its cotangent goes; `None` where nowhere.
    - `outcome`: what came out in JAX, once it did.
    """

    name: str
    program: Program
    inputs: list[Any]
    places: tuple[int, ...]
    probe: Any
    report: Report | None
    outcome: Outcome | None = None

    def merged(self, tensors: tuple[Any, ...]) -> list[Any]:
        """The inputs, the tensors handed over."""
        merged = list(self.inputs)
        for place, tensor in zip(self.places, tensors, strict=True):
            merged[place] = as_input(tensor)
        return merged

    def rebuilt(self, tensors: tuple[Any, ...]) -> Any:
        """What the function returned, with these tensors in it."""
        assert self.outcome is not None
        smooth, discrete, told = self.outcome
        if len(tensors) == 1 and not jax.tree.leaves((discrete, told)):
            return jax.tree.unflatten(jax.tree.structure(smooth), tensors)
        remaining = iter(tensors)
        parts = [jax.tree.map(lambda _: next(remaining), part) for part in (smooth, discrete)]
        return eqx.combine(*parts, told)


def call(one: Call, tensors: tuple[Any, ...]) -> Any:
    """Run a program, joined to torch's graph where a tensor requires grad.

    **Returns:** what its body returned, in tensors, reports as they are.
    """
    # Without a gradient, too: of a forward derivative and of torch.func torch itself then says
    # that a node has none.
    return one.rebuilt(_Node.apply(one, torch.is_grad_enabled(), *tensors))


class _Node(torch.autograd.Function):
    """A node of torch's graph."""

    @staticmethod
    def forward(context: Any, one: Call, graph: bool, *tensors: Any) -> Any:  # noqa: FBT001
        """The program, keeping its pullback."""
        needed = context.needs_input_grad[2:]
        chosen = tuple(
            index
            for index, tensor in enumerate(tensors)
            if graph and needed[index] and (tensor.is_floating_point() or tensor.is_complex())
        )
        if not chosen:
            outcome = one.outcome = one.program.run(one.merged(tensors), one.probe)
            wait(outcome, tensors)
            return _tensors(outcome)
        wanted = tuple(one.places[index] for index in chosen)
        outcome, pullback = one.program.forward(one.merged(tensors), one.probe, wanted)
        one.outcome = outcome
        wait((outcome, pullback), tensors)
        outputs = _tensors(outcome)
        smooth = len(jax.tree.leaves(outcome.smooth))
        context.mark_non_differentiable(*outputs[smooth:])
        # What the pullback holds on to may lie in the memory of these: torch sees to it that nobody
        # wrote into them before the backward pass.
        context.save_for_backward(*tensors, *outputs)
        context.one, context.pullback = one, pullback
        context.chosen, context.wanted, context.smooth = chosen, wanted, smooth
        context.double = double_precision()
        return outputs

    @staticmethod
    def backward(context: Any, *cotangents: Any) -> tuple[Any, ...]:
        """The pullback; as a program of its own where it is to be differentiated."""
        one: Call = context.one
        tensors = context.saved_tensors[: len(one.places)]
        cotangents = cotangents[: context.smooth]
        gradients: list[Any] = [None] * (2 + len(tensors))
        # A backward pass on a GPU runs in a thread of its own, which knows nothing of the caller's
        # precision.
        with in_precision(double=context.double):
            if torch.is_grad_enabled():
                found, probe = _differentiable(context, tensors, cotangents)
            else:
                arrays = [as_input(cotangent) for cotangent in cotangents]
                leaves, probe = one.program.backward(context.pullback, arrays)
                wait((leaves, probe), tensors)
                found = [as_tensor(leaf) for leaf in leaves]
        if one.report is not None:
            one.report.fill(probe)
        for index, gradient in zip(context.chosen, found, strict=True):
            gradients[2 + index] = gradient
        return tuple(gradients)


def _differentiable(context: Any, tensors: Any, cotangents: Any) -> tuple[list[Any], Any]:
    """The gradients as functions of the inputs, for second derivatives."""
    one: Call = context.one
    if one.program.final:
        msg = (
            "hypergradient: there is no second derivative, for the gradient is a number that came "
            "with the value. Leave create_graph out, or use function with a loss that JAX "
            "differentiates, such as outer_loss(bl.solve(...).value, theta)."
        )
        raise RuntimeError(msg)
    count = len(one.inputs)
    derivative = Call(
        name=one.name,
        program=one.program.derivative(count, context.wanted),
        inputs=[*one.inputs, *([None] * len(cotangents))],
        places=(*one.places, *range(count, count + len(cotangents))),
        probe=one.probe,
        report=None,
    )
    return call(derivative, (*tensors, *cotangents))


def _tensors(outcome: Outcome) -> tuple[Any, ...]:
    leaves = [*jax.tree.leaves(outcome.smooth), *jax.tree.leaves(outcome.discrete)]
    return tuple(as_tensor(leaf) for leaf in leaves)
