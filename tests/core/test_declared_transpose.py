"""A transpose that is none: declared things are trusted, and one call finds out."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import ConformanceError, check_inner_problem
from tests.marks import others_slow

DEFINITE = jnp.array([[3.0, 1.0, 0.0], [1.0, 4.0, 0.5], [0.0, 0.5, 5.0]])
GENERAL = DEFINITE + jnp.triu(jnp.full((3, 3), 0.1), 1)
ZEROS = jnp.zeros(3)


def result(problem: Any, *, error: bool = True) -> Any:
    return bl.hypergradient(
        lambda x, theta: jnp.sum(jnp.arange(3) * x), problem, jnp.ones(3), ZEROS, error=error
    )


def paired(back: Any) -> Any:
    """A matvec with what is said to be its adjoint."""
    functions = (lambda v: GENERAL @ v), (lambda v: back @ v)
    return bl.LinearSystem(lambda theta: functions, lambda theta: theta)


def declared(matrix: Any) -> Any:
    operator: Any = lambda theta: lambda v: matrix @ v  # noqa: E731  nothing but a matvec
    return bl.LinearSystem(operator, lambda theta: theta, symmetric=True)


WRONG = {
    "rmatvec": (paired(GENERAL), "adjoint"),
    "symmetric": (declared(GENERAL), "symmetric"),
    "symmetric root": (
        bl.RootFinding(lambda x, theta: GENERAL @ x - theta, symmetric=True),
        "symmetric",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_call_finds_out(name: str):
    problem, broken = WRONG[name]
    with pytest.raises(ConformanceError) as raised:
        check_inner_problem(problem, jnp.ones(3), ZEROS)
    assert raised.value.broken == broken


@pytest.mark.parametrize("name", others_slow(WRONG, "rmatvec", "symmetric"))
def test_a_hypergradient_with_an_error_estimate_finds_out(name: str):
    found = result(WRONG[name][0])
    assert int(found.adjoint.status) == bl.Status.NOT_ADJOINT
    assert np.all(np.isnan(found.gradient))
    assert np.isinf(found.error.total)
    assert "check_inner_problem" in found.adjoint.diagnosis


@pytest.mark.parametrize(
    "problem", [pytest.param(paired(GENERAL.T), marks=pytest.mark.slow), declared(DEFINITE)]
)
def test_what_is_right_is_left_alone(problem: Any):
    found = result(problem)
    assert int(found.adjoint.status) == bl.Status.CONVERGED
    assert np.all(np.isfinite(found.gradient))
    np.testing.assert_array_equal(found.gradient, result(problem, error=False).gradient)
