"""PyTorch outside, JAX inside: a JAX function of arrays as a function of tensors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.evaluation import Hypergradient
from bilevel.evaluation import hypergradient as bilevel_hypergradient
from bilevel.probe import AdjointProbe, Probe
from bilevel.signature import brief, check_callable
from bilevel_arrays.torch.arguments import Arguments, Sorted
from bilevel_arrays.torch.bridge import Call, call
from bilevel_arrays.torch.captured import looked_out_for
from bilevel_arrays.torch.exchange import torch
from bilevel_arrays.torch.program import Program
from bilevel_arrays.torch.report import Report

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
    where they are, in the same memory where their layout allows.

    `fn` is compiled once for each combination of shapes, dtypes and of tensors that require
    grad. As for `jax.jit`, numbers are arrays; what else is among the arguments (strings,
    booleans, functions), and what `fn` captured when it was called first, is part of what is
    compiled. A `bl.Budget` or a `bl.Fidelity` is numbers: refining compiles nothing.

    A `bl.Solution` among what `fn` returns comes out with its `value` in tensors and its numbers
    as they are. For a hypergradient with its report see [`hypergradient`][].

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
    return _of_tensors(fn, tuple(constant), probe, known=False)


def hypergradient(
    outer_loss: Callable[[Any, Any], Any], problem: object, **settings: Any
) -> Callable[..., Hypergradient]:
    """`bl.hypergradient` of tensors: a loss that joins torch's autograd, with its report.

    **Arguments:**

    - `outer_loss`, `problem`: as for `bl.hypergradient`, in JAX.
    - `settings`: further arguments of `bl.hypergradient` that stay the same, such as `solver` and
        `estimator`.

    **Returns:** a function of `theta` and `x0`, pytrees of tensors, and of further keyword
    arguments of `bl.hypergradient` such as `budget`. It returns a `bl.Hypergradient` whose
    `value` is a tensor, and whose gradient the backward pass of that value hands on: it solves
    nothing again. The other fields, from both solutions to the estimated error, are numbers of
    JAX.

    **Raises:** as [`function`][]; `x0` is constant, and there is no second derivative.

    >>> import torch, jax.numpy as jnp, bilevel as bl, bilevel_arrays as ba
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    >>> evaluate = ba.torch.hypergradient(lambda x, theta: jnp.sum(x**2), problem)
    >>> theta = torch.ones(2, requires_grad=True)
    >>> result = evaluate(theta, torch.zeros(2), budget=bl.Budget(rtol=1e-5))
    >>> result.value.backward()
    >>> theta.grad, result.diagnosis.split(":")[0]
    (tensor([2., 2.]), 'Neither solve is short')
    """
    check_callable("hypergradient", "outer_loss", outer_loss, ("x", "theta"))

    def evaluate(theta: Any, x0: Any, /, **given: Any) -> Hypergradient:
        return bilevel_hypergradient(outer_loss, problem, theta, x0, **settings, **given)

    return _of_tensors(evaluate, ("x0",), None, known=True)


def _of_tensors(
    fn: Callable[..., Any],
    constant: tuple[str, ...],
    probe: Probe | AdjointProbe | None,
    *,
    known: bool,
) -> Callable[..., Any]:
    arguments = Arguments(fn, constant)
    programs: dict[Any, Program] = {}

    @functools.wraps(fn)
    def of_tensors(*args: Any, **kwargs: Any) -> Any:
        found = arguments.sort(args, kwargs)
        program = _program(programs, fn, arguments, found, known=known)
        report = None if probe is None else Report(arguments.name)
        tensors = tuple(found.inputs[place] for place in found.tensors)
        inputs = list(found.inputs)
        for place in found.tensors:
            inputs[place] = None
        outcome = call(Call(arguments.name, program, inputs, found.tensors, probe, report), tensors)
        return outcome if report is None else (outcome, report)

    return torch.compiler.disable(of_tensors, reason=_NOT_COMPILED)


def _program(
    programs: dict[Any, Program],
    fn: Callable[..., Any],
    arguments: Arguments,
    found: Sorted,
    *,
    known: bool,
) -> Program:
    """The program for arguments of this structure; made once."""
    key = found.treedef, found.static
    try:
        made = programs.get(key)
    except TypeError:
        place, leaf = next((p, v) for p, v in found.static if not _hashable(v))
        msg = (
            f"{arguments.name}: {arguments.where(found.treedef, place)} is {brief(leaf)}, which is "
            "no tensor, array or number and cannot be compared with what was compiled before. "
            "Capture it in the function."
        )
        raise TypeError(msg) from None
    if made is None:

        def body(inputs: list[Any], probe: Any) -> Any:
            remaining, static = iter(inputs), dict(found.static)
            count = found.treedef.num_leaves
            leaves = [static[at] if at in static else next(remaining) for at in range(count)]
            args, kwargs = jax.tree.unflatten(found.treedef, leaves)
            with looked_out_for(arguments.name):
                outcome = fn(*args, **kwargs, **({} if probe is None else {"probe": probe}))
                return jax.tree.map(jnp.asarray, outcome)

        made = programs[key] = Program(body, arguments.first_argument(found) if known else None)
    return made


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
