"""PyTorch outside, JAX inside: a JAX function of arrays as a function of tensors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bilevel.probe import AdjointProbe, Probe
from bilevel.signature import brief
from bilevel_arrays.arguments import Arguments, Sorted
from bilevel_arrays.bridge import Call, call
from bilevel_arrays.program import Program
from bilevel_arrays.report import Report

__all__ = ["Report", "function"]

_NOT_COMPILED = (
    "bilevel_arrays.torch.function runs a program that JAX compiles, which torch.compile leaves "
    "outside: the graph breaks here, and nothing is lost, for there is nothing of torch in it."
)


def function(
    fn: Callable[..., Any],
    *,
    constant: Sequence[str] = (),
    probe: Probe | AdjointProbe | None = None,
) -> Callable[..., Any]:
    """A JAX function, which solves an inner problem, as a function of torch's tensors.

    What it returns takes tensors wherever `fn` takes arrays, in any pytree, and returns
    tensors in the pytree that `fn` returns. It joins torch's autograd, second derivatives
    included where the estimator has them. Tensors are handed over by DLPack on the device
    where they are, in the same memory where their layout allows. `fn` is compiled once for each
    combination of shapes, dtypes and of tensors that require grad. As for `jax.jit`, numbers are
    arrays, and what else is among the arguments (strings, booleans, functions) is part of what
    is compiled; a `bl.Budget` or a `bl.Fidelity` is numbers, so that refining compiles nothing.

    A `bl.Solution` or a `bl.Hypergradient` among what `fn` returns comes out with its `value` in
    tensors and its numbers as they are. Where `fn` returns a `bl.Hypergradient`, the
    gradient of its value with respect to the first argument is the one that it holds, without
    a further solve.

    `torch.compile` breaks its graph at the call and goes on after it.

    **Arguments:**

    - `fn`: of pytrees of arrays, as for `jax.jit`.
    - `constant`: names of its parameters that are not differentiated: a tensor in them that
        requires grad is refused.
    - `probe`: `bl.Probe.zeros()` or `bl.AdjointProbe.zeros(x0)`, which `fn` is then called with
        as the keyword `probe`, to pass on to `bl.solve`. The function returns a pair, the second
        of which is a [`Report`][]: its `probe` is what the backward pass brings back.

    **Returns:** the function of tensors.

    **Raises:** `TypeError` for what is no function; when called, for tensors on two devices or in
    two precisions, for one that JAX has no device for, and for one of 64 bits where JAX
    computes in 32; `ValueError` for a tensor in a constant argument that requires grad.

    >>> import torch, jax.numpy as jnp, bilevel as bl, bilevel_arrays as ba
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    >>> def nearest(theta):
    ...     return bl.solve(problem, theta, jnp.zeros(2)).value
    >>> theta = torch.ones(2, requires_grad=True)
    >>> loss = (ba.torch.function(nearest)(theta) ** 2).sum()
    >>> loss.backward()
    >>> theta.grad
    tensor([2., 2.])
    """
    if not callable(fn):
        msg = f"function: fn should be a function of arrays, got {brief(fn)}."
        raise TypeError(msg)
    if isinstance(constant, str):
        msg = f"function: constant should be a sequence of names. Write constant=[{constant!r}]."
        raise TypeError(msg)
    if probe is not None and not isinstance(probe, Probe | AdjointProbe):
        msg = (
            "function: probe should be bl.Probe.zeros() or bl.AdjointProbe.zeros(x0), got "
            f"{brief(probe)}."
        )
        raise TypeError(msg)
    arguments = Arguments(fn, tuple(constant))
    programs: dict[Any, Program] = {}

    @functools.wraps(fn)
    def of_tensors(*args: Any, **kwargs: Any) -> Any:
        found = arguments.sort(args, kwargs)
        program = _program(programs, fn, arguments, found)
        report = None if probe is None else Report(arguments.name)
        tensors = tuple(found.inputs[place] for place in found.tensors)
        inputs = list(found.inputs)
        for place in found.tensors:
            inputs[place] = None
        outcome = call(
            Call(arguments.name, program, inputs, found.tensors, probe, report), tensors
        )
        return outcome if report is None else (outcome, report)

    # What torch.compiler.disable sets; calling it would import the compiler for nothing.
    of_tensors._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]  # noqa: SLF001
    of_tensors._torchdynamo_disable_msg = _NOT_COMPILED  # pyright: ignore[reportFunctionMemberAccess]  # noqa: SLF001
    return of_tensors


def _program(
    programs: dict[Any, Program], fn: Callable[..., Any], arguments: Arguments, found: Sorted
) -> Program:
    """The program for arguments of this structure; made once."""
    key = found.treedef, found.static
    try:
        known = programs.get(key)
    except TypeError:
        place, leaf = next((p, v) for p, v in found.static if not _hashable(v))
        msg = (
            f"{arguments.name}: {arguments.where(found.treedef, place)} is {brief(leaf)}, which is "
            "no tensor, array or number and cannot be compared with what was compiled before. "
            "Capture it in the function."
        )
        raise TypeError(msg) from None
    if known is None:

        def body(inputs: list[Any], probe: Any) -> Any:
            remaining, static = iter(inputs), dict(found.static)
            count = found.treedef.num_leaves
            leaves = [static[at] if at in static else next(remaining) for at in range(count)]
            args, kwargs = jax.tree.unflatten(found.treedef, leaves)
            return fn(*args, **kwargs) if probe is None else fn(*args, **kwargs, probe=probe)

        known = programs[key] = Program(body, arguments.first_argument(found))
    return known


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
