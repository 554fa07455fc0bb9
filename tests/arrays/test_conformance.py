"""Every cell of the table: the numbers, statuses and counts of JAX come out of any library."""

import functools
import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_arrays as ba
from tests.arrays.cases import LIBRARIES, PROBLEMS, ROWS, START, THETA, label

FAST = {"map-FixedPointIteration-Neumann", "definite-ConjugateGradient-Implicit-ConjugateGradient"}
BUDGETS = {
    "to a tolerance": (
        bl.Budget(iterations=300, rtol=1e-11),
        bl.Budget(iterations=300, rtol=1e-11),
    ),
    # A cycle of GMRES is many steps; whether it ends a digit above rounding is chance.
    "a few steps": (bl.Budget(iterations=3, rtol=1e-13), bl.Budget(iterations=2, rtol=1e-13)),
}
ROW = {label(row): row for row in ROWS}


def library(name):
    """The library, or a skip that says what is missing."""
    module = name.partition(",")[0]
    if importlib.util.find_spec(module) is None:
        reason = "needs a CUDA device and CuPy" if module == "cupy" else f"pip install {module}"
        pytest.skip(f"{module} is not installed: {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its import
        return LIBRARIES[name]()


@functools.cache
def reference(row, budget):
    """The same solve by `bl.hypergradient`."""
    name, solver, estimator = ROW[row]
    made = LIBRARIES["jax"]()
    primal, adjoint = BUDGETS[budget]
    return bl.hypergradient(
        lambda x, t: jnp.sum(jnp.sin(x)) + jnp.sum(t * x),
        PROBLEMS[name](made).made(made),
        jnp.asarray(THETA),
        jnp.asarray(START),
        solver=solver,
        estimator=estimator,
        budget=primal,
        adjoint_budget=adjoint,
        error=False,
    )


def found(row, budget, made):
    """The solve on the library's own arrays."""
    name, solver, estimator = ROW[row]
    xp = made.namespace
    primal, adjoint = BUDGETS[budget]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC|invariant)")  # torch's, in beta
        problem = PROBLEMS[name](made).made(made)
        return ba.hypergradient(
            lambda x, t: xp.sum(xp.sin(x)) + xp.sum(t * x),
            problem,
            made.put(THETA),
            made.put(START),
            outer_gradient=None if made.autograd else lambda x, t: (xp.cos(x) + t, x),
            solver=solver,
            estimator=estimator,
            budget=primal,
            adjoint_budget=adjoint,
        )


def cells():
    for row in ROW:
        for name in LIBRARIES:
            if name == "jax" or (name.endswith("rows") and "sparse" not in row):
                continue
            marks = [] if row in FAST else [pytest.mark.slow]
            marks += [pytest.mark.gpu] if name == "cupy" else []
            yield pytest.param(row, name, marks=marks, id=f"{row}-{name}")


@pytest.mark.parametrize(("row", "name"), list(cells()))
def test_a_cell_has_the_numbers_of_jax(row, name):
    made = library(name)
    for budget in BUDGETS:
        expected, here = reference(row, budget), found(row, budget, made)
        np.testing.assert_allclose(here.value, expected.value, rtol=1e-10)
        np.testing.assert_allclose(
            made.get(here.gradient), expected.gradient, rtol=1e-10, atol=1e-12
        )
        for mine, theirs in ((here.primal, expected.primal), (here.adjoint, expected.adjoint)):
            np.testing.assert_allclose(made.get(mine.value), theirs.value, rtol=1e-10, atol=1e-12)
            assert bl.Status(int(mine.status)) == bl.Status(int(theirs.status))
            assert int(mine.iterations) == int(theirs.iterations)
            assert int(mine.applications) == int(theirs.applications)
            for number in ("scale", "tolerance"):
                np.testing.assert_allclose(
                    getattr(mine, number), getattr(theirs, number), rtol=1e-7
                )
        assert type(here.primal.value) is type(made.put(START))


def test_every_solver_and_estimator_stands_in_the_table():
    from bilevel_arrays.choice import STEPPINGS

    assert {type(solver) for _, solver, _ in ROWS} == set(STEPPINGS)
    assert {type(estimator) for *_, estimator in ROWS} == {bl.Implicit, bl.Neumann}
    assert {problem for problem, *_ in ROWS} == set(PROBLEMS)


def test_the_table_is_of_double_precision():
    """Else it would agree to seven digits at best."""
    assert jnp.asarray(THETA).dtype == np.float64
    assert jax.config.read("jax_enable_x64")
