"""A JAX function of a list of arrays, compiled, with its pullback: what a bridge calls."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
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
    - `known`: where the body returns a `Hypergradient`, whose gradient is what the value is
        differentiated to, which leaf of that gradient belongs to each of the first inputs.
    """

    def __init__(self, body: Body, known: tuple[int, ...] | None = None):
        self._body = body
        self._known = known
        self._derivatives: dict[tuple[int, tuple[int, ...]], Program] = {}
        self.run = jax.jit(self._run)
        self.forward = jax.jit(self._forward, static_argnums=2)
        self.backward = jax.jit(_backward)

    @property
    def final(self) -> bool:
        """Whether the gradient is a number that came with the value, and has no derivative."""
        return self._known is not None

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
            if self._known is None:
                outcome = self._body(merged, probe)
            else:
                result = self._body(jax.lax.stop_gradient(merged), probe)
                leaves = jax.tree.leaves(result.gradient, is_leaf=lambda leaf: leaf is None)
                gradients = [leaves[self._known[place]] for place in wanted]
                value = _known(moving, result.value, gradients)
                outcome = eqx.tree_at(lambda r: r.value, result, value)
            smooth, discrete, report = _split(outcome)
            return jax.tree.leaves(smooth), (smooth, discrete, report)

        moving = [inputs[place] for place in wanted]
        _, pullback, parts = jax.vjp(of_wanted, moving, probe, has_aux=True)
        return _fresh(Outcome(*parts)), pullback


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
