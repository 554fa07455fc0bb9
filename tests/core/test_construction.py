"""What is wrong with an inner problem is said where it is made."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl

ROOT = Path(__file__).resolve().parents[2]


class Callable2:
    """A callable object that takes what is asked for."""

    def __call__(self, x: Any, theta: Any) -> Any:
        return x - theta


@pytest.mark.parametrize("kind", [bl.Minimization, bl.RootFinding, bl.FixedPoint])
def test_a_function_of_x_and_theta_is_expected(kind: Any):
    with pytest.raises(TypeError, match=rf"{kind.__name__}: .* a function of \(x, theta\), got 3"):
        kind(3)
    with pytest.raises(TypeError, match=r"should take \(x, theta\), but it takes \(x\)"):
        kind(lambda x: x)
    with pytest.raises(TypeError, match=r"takes \(x, theta, more\)\. Wrap it: lambda x, theta:"):
        kind(lambda x, theta, more: x)


@pytest.mark.parametrize(
    "function",
    [
        Callable2(),
        jax.jit(Callable2()),
        functools.partial(lambda scale, x, theta: scale * x - theta, 2.0),
        lambda *both: both[0] - both[1],
        lambda x, theta, scale=1.0: scale * x - theta,
        jnp.subtract,
    ],
)
def test_whatever_can_be_called_so_is_accepted(function: Any):
    assert bl.RootFinding(function).residual(2.0, 2.0) in (0.0, 2.0)


def test_a_subclass_with_a_function_of_its_own_is_named():
    class Fit(bl.Minimization):
        pass

    with pytest.raises(TypeError, match="Fit: objective should be a function"):
        Fit("mean")


@pytest.mark.parametrize(
    ("operator", "rhs", "message"),
    [
        (lambda v, w: v, 1.0, r"operator should take \(theta\), but it takes \(v, w\)"),
        ([[1.0]], 1.0, "the operator must be a square matrix.* got list"),
        (jnp.eye(2), None, "rhs should be an array or a function of theta, got None"),
        (jnp.eye(2), "ones", "rhs should be an array or a function of theta, got 'ones'"),
        (jnp.eye(2), lambda: 1.0, r"rhs should take \(theta\), but it takes \(\)"),
    ],
)
def test_a_linear_system_of_the_wrong_parts_is_refused(operator: Any, rhs: Any, message: str):
    with pytest.raises(TypeError, match=message):
        bl.LinearSystem(operator, rhs)


@pytest.mark.parametrize("value", [1e-6, 0.5])
def test_a_tolerance_for_iterations_is_recognised(value: float):
    with pytest.raises(TypeError, match=rf"For a tolerance write Budget\(rtol={value!r}\)\."):
        bl.Budget(value)  # pyright: ignore[reportArgumentType]


def test_a_number_that_is_no_tolerance_is_not_taken_for_one():
    with pytest.raises(TypeError, match=r"got 3.5 of type float\. Use int\(\.\.\.\)\."):
        bl.Budget(3.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="got True of type bool"):
        bl.Budget(iterations=True)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("CG", "ConjugateGradient"),
        ("GD", "GradientDescent"),
        ("ConjugateGradients", "ConjugateGradient"),
        ("BiCGSTAB", "BiCGStab"),
        ("minres", "MINRES"),
        ("NewtonKrylov", "Newton"),
    ],
)
def test_a_name_that_is_none_gets_the_nearest_one(written: str, meant: str):
    with pytest.raises(AttributeError, match=rf"no attribute '{written}'; did you mean {meant}\?"):
        getattr(bl, written)


def test_nothing_is_suggested_for_what_is_near_to_nothing():
    with pytest.raises(AttributeError, match=r"'zzz'; dir\(bilevel\) lists what there is"):
        bl.zzz  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute '__wrapped__'$"):
        bl.__wrapped__  # noqa: B018


def test_a_wrong_name_does_not_import_jax():
    code = "import sys, bilevel\nprint(hasattr(bilevel, 'CG'), 'jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]
