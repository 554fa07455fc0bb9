"""A JAX function of a list of arrays, compiled, with its pullback: what a bridge calls."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.evaluation import Hypergradient
from bilevel.probe import AdjointProbe, Probe
from bilevel.solution import Solution

Body = Callable[[list[Any], Any], Any]
"""(inputs, probe) -> any pytree of arrays."""


class Outcome(NamedTuple):
    """What a program returned, in three pytrees that `eqx.combine` makes one of.

    - `smooth`: the float and complex arrays, which derivatives go through.
    - `discrete`: the other arrays.
    - `report`: numbers about solves: all of a probe, and all but the value of a `Solution` or a
        `Hypergradient`.
    """

    smooth: PyTree
    discrete: PyTree
    report: PyTree


class Program:
    """A function of arrays, compiled once for all calls with arrays of the same kinds.

    **Arguments:**

    - `body`: (inputs, probe) -> any pytree of arrays.
    - `first`: of the first inputs, which leaves of the first argument they are, for that is what
        a `Hypergradient` refers to.
    """

    def __init__(self, body: Body, first: tuple[int, ...] = ()):
        self._body = body
        self._first = first
        self._derivatives: dict[tuple[int, tuple[int, ...]], Program] = {}
        self.final = False
        """Whether the gradient is a number that came with the value, and has no derivative."""
        self.run = jax.jit(self._run)
        self.forward = jax.jit(self._forward, static_argnums=2)
        self.backward = jax.jit(_backward)

    def derivative(self, count: int, wanted: tuple[int, ...]) -> "Program":
        """The pullback as a program of its own: of `count` inputs, then a cotangent each.

        It returns the cotangents of the inputs wanted, and that of the probe.
        """
        if (count, wanted) not in self._derivatives:

            def body(inputs: list[Any], probe: Any) -> Any:
                _, pullback = self._forward(inputs[:count], probe, wanted)
                return _backward(pullback, inputs[count:])

            self._derivatives[count, wanted] = Program(body)
        return self._derivatives[count, wanted]

    def _run(self, inputs: list[Any], probe: Any) -> Outcome:
        return _fresh(_split(self._body(inputs, probe)))

    def _forward(
        self, inputs: list[Any], probe: Any, wanted: tuple[int, ...]
    ) -> tuple[Outcome, Any]:
        """The outcome, and the pullback from its smooth part to the inputs wanted and the probe."""

        def of_wanted(moving: list[Any], probe: Any) -> Any:
            merged = list(inputs)
            for place, leaf in zip(wanted, moving, strict=True):
                merged[place] = leaf
            outcome = self._body(merged, probe)
            if isinstance(outcome, Hypergradient):
                outcome = self._with_known_gradient(merged, probe, wanted)
            smooth, discrete, report = _split(outcome)
            return jax.tree.leaves(smooth), (smooth, discrete, report)

        moving = [inputs[place] for place in wanted]
        _, pullback, parts = jax.vjp(of_wanted, moving, probe, has_aux=True)
        return _fresh(Outcome(*parts)), pullback

    def _with_known_gradient(self, inputs: list[Any], probe: Any, wanted: tuple[int, ...]) -> Any:
        """The hypergradient again, its value with the gradient for derivative: no second solve."""
        others = [place for place in wanted if place >= len(self._first)]
        if others:
            msg = (
                f"{len(others)} tensors beyond the first argument require grad, and a function "
                "that returns a Hypergradient has the derivative with respect to its first "
                "argument alone. Detach them, or return a value that JAX differentiates, such as "
                "outer_loss(bl.solve(...).value, theta)."
            )
            raise TypeError(msg)
        self.final = True
        result = self._body(jax.lax.stop_gradient(inputs), probe)
        # None, as for an integer, is a leaf here, so that places are those of the argument.
        gradients = jax.tree.leaves(result.gradient, is_leaf=lambda leaf: leaf is None)
        moving = [inputs[place] for place in wanted]
        known = [
            gradients[self._first[place]] if self._first[place] < len(gradients) else None
            for place in wanted
        ]
        expected, got = ([(jnp.shape(leaf)) for leaf in leaves] for leaves in (moving, known))
        if expected != got:
            msg = (
                "the Hypergradient that the function returned has a gradient of shapes "
                f"{got}, expected {expected} as its first argument has. Give bl.hypergradient the "
                "first argument as it is for theta, and derive what else there is inside."
            )
            raise TypeError(msg)
        return eqx.tree_at(lambda r: r.value, result, _known(moving, result.value, known))


@jax.custom_vjp
def _known(moving: list[Array], value: Array, gradients: list[Array]) -> Array:
    del moving, gradients
    return value


def _known_forward(
    moving: list[Array], value: Array, gradients: list[Array]
) -> tuple[Array, list[Array]]:
    del moving
    return value, gradients


def _known_backward(gradients: list[Array], cotangent: Array) -> tuple[Any, None, None]:
    return [cotangent.astype(leaf.dtype) * leaf for leaf in gradients], None, None


_known.defvjp(_known_forward, _known_backward)


def _backward(pullback: Any, cotangents: list[Array]) -> tuple[list[Array], Any]:
    """Cotangents of the inputs and of the probe, in the convention of torch.

    For complex numbers that is the direction of steepest ascent, the conjugate of JAX's.
    """
    gradients, probe = pullback(vector.conjugate(cotangents))
    return vector.conjugate(gradients), probe


def _fresh(outcome: Any) -> Any:
    """The outcome in memory of its own, never that of an input, a constant, or twice the same."""
    return jax.lax.optimization_barrier(outcome)


_REPORTS = (Solution, Hypergradient, Probe, AdjointProbe)


def _split(outcome: Any) -> Outcome:
    outcome = jax.tree.map(jnp.asarray, outcome)
    report = functools.partial(jax.tree.map, is_leaf=lambda node: isinstance(node, _REPORTS))

    def numbers(node: Any) -> Any:
        """A mask: whether an array is one of the numbers about a solve."""
        if not isinstance(node, _REPORTS):
            return False
        mask = jax.tree.map(lambda _: True, node)
        if isinstance(node, Solution | Hypergradient):
            value = jax.tree.map(lambda _: False, node.value)
            mask = eqx.tree_at(lambda m: m.value, mask, value, is_leaf=lambda leaf: leaf is None)
        return mask

    told, rest = eqx.partition(outcome, report(numbers, outcome))
    smooth, discrete = eqx.partition(rest, eqx.is_inexact_array)
    return Outcome(smooth, discrete, told)
