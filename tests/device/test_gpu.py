"""The same numbers on a GPU as on the CPU: skipped, with the reason, where JAX finds none.

Each runs on the CPU as well, among the slow tests: so it is known to run before there is a GPU.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from tests.core.cases import SOLVERS, by_name, loss
from tests.examples.loading import EXAMPLES

ROOT = Path(__file__).parents[2]

PLACES = [
    pytest.param("gpu", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=pytest.mark.slow),
]


@pytest.fixture(params=PLACES)
def device(request):
    """Where it runs; what is made inside is made there."""
    chosen = jax.devices("cpu")[0] if request.param == "cpu" else jax.devices()[0]
    with jax.default_device(chosen):
        yield chosen


def on_cpu(function, *arguments):
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.device_get(function(*jax.device_put(arguments, cpu)))


def lies_on(tree, device):
    return all(leaf.devices() == {device} for leaf in jax.tree.leaves(tree))


def gradient(case, estimator):
    def value(theta):
        solution = bl.solve(
            case.example.problem,
            theta,
            case.example.x0,
            solver=case.make(),
            estimator=estimator,
            budget=case.budget,
        )
        return loss(solution.value, theta), solution

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@pytest.mark.parametrize("case", SOLVERS, ids=by_name)
def test_solvers_converge_to_the_same_solution(case, device):
    theta = jax.device_put(jnp.asarray(case.example.theta), device)
    (value, solution), found = gradient(case, bl.Implicit())(theta)
    assert lies_on((value, solution, found), device)
    assert solution.diagnosis.startswith(("CONVERGED", "BUDGET"))
    np.testing.assert_allclose(solution.value, on_cpu(case.example.solution, theta), atol=1e-8)
    np.testing.assert_allclose(found, jax.device_get(case.example.hypergradient), atol=1e-7)


ESTIMATORS = {
    "implicit": bl.Implicit(bl.ConjugateGradient()),
    "unrolled": bl.Unrolled(),
    "unrolled forward": bl.Unrolled(mode="forward"),
    "unrolled last": bl.Unrolled(last=8),
    "neumann": bl.Neumann(step_size=0.3),
    "one step": bl.OneStep(),
    "nystrom": bl.Nystrom(rank=4, damping=1e-7),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_give_the_same_derivative(name, device):
    case = next(case for case in SOLVERS if case.name == "GradientDescent")
    example = case.example

    @jax.jit
    def evaluated(theta):
        given = {"solver": case.make(), "estimator": ESTIMATORS[name], "error": False}
        budgets = {"budget": bl.Budget(60), "adjoint_budget": bl.Budget(60)}
        return bl.hypergradient(
            loss, example.problem, theta, example.x0, **given, **budgets
        ).gradient

    theta = jax.device_put(jnp.asarray(example.theta), device)
    found = evaluated(theta)
    assert lies_on(found, device)
    np.testing.assert_allclose(found, on_cpu(evaluated, theta), rtol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operators_of_grids_are_the_same(dtype, device):
    grid = pde.Grid((12, 10), 1.0, [pde.Dirichlet(), pde.Periodic()], "cell", dtype=dtype)
    field = jnp.asarray(np.random.default_rng(0).normal(size=grid.shape), dtype)
    weight = 1 + field**2
    operators = {
        "laplacian": lambda v, k: pde.laplacian(grid).matvec(v),
        "diffusion": lambda v, k: pde.Diffusion(grid, k).matvec(v),
        "its transpose": lambda v, k: pde.Diffusion(grid, k).rmatvec(v),
        "advection": lambda v, k: pde.advection(grid, (1.0, -2.0)).matvec(v),
        "of its coefficients": lambda v, k: jax.grad(
            lambda k: jnp.sum(jnp.sin(pde.Diffusion(grid, k).matvec(v)))
        )(k),
    }
    tolerance = 1e-4 if dtype == "float32" else 1e-11
    for name, function in operators.items():
        found = jax.jit(function)(field, weight)
        assert lies_on(found, device), name
        np.testing.assert_allclose(
            found, on_cpu(function, field, weight), rtol=tolerance, atol=tolerance, err_msg=name
        )


def test_multigrid_takes_the_same_iterations(device):
    grid = pde.Grid((16, 16), 1.0, pde.Dirichlet(), "cell")
    problem = bl.LinearSystem(
        lambda theta: -pde.laplacian(grid),
        lambda theta: theta,
        symmetric=True,
        positive_definite=True,
    )
    solver = bl.ConjugateGradient(preconditioner=pde.Multigrid())

    @jax.jit
    def solve(source):
        given = {"solver": solver, "budget": bl.Budget(50, rtol=1e-10)}
        return bl.solve(problem, source, jnp.zeros(grid.shape), **given)

    source = jnp.ones(grid.shape)
    found, expected = solve(source), on_cpu(solve, source)
    assert lies_on(found.value, device)
    assert int(found.iterations) == int(expected.iterations)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-9)


def test_nothing_is_moved_inside_a_compiled_gradient(device):
    case = next(case for case in SOLVERS if case.name == "ConjugateGradient")
    theta = jax.device_put(jnp.asarray(case.example.theta), device)
    compiled = gradient(case, bl.Implicit()).lower(theta).compile()
    jax.block_until_ready(compiled(theta))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(theta))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_precisions_are_fidelities_there_too(dtype, device):
    matrix = jnp.eye(64, dtype=dtype) * 2
    problem = bl.LinearSystem(
        lambda theta: bl.mixed_precision(lambda v: matrix @ v, dtype),
        lambda theta: theta,
        symmetric=True,
    )
    theta = jnp.linspace(1.0, 2.0, 64, dtype=jnp.float32)
    x0 = jnp.zeros(64, jnp.float32)
    budget = bl.Budget(iterations=3)
    found = bl.solve(problem, theta, x0, solver=bl.Richardson(0.5), budget=budget).value
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, theta / 2, rtol=1e-2 if dtype == "bfloat16" else 1e-6)


@pytest.mark.parametrize("name", ["poisson_inverse", "ridge"])
def test_examples_train_for_two_epochs(name, device, tmp_path, capsys):
    from bilevel.cli import main

    words = ["--epochs", "2", "--policy", "full", "--quiet", "--directory", str(tmp_path / "r")]
    assert main(["run", str(EXAMPLES / f"{name}.py"), *words]) == 0
    run = bl.Run.read(tmp_path / "r")
    assert (run.status, run.summary.epochs) == ("completed", 2)
    assert run.summary.failures in (0, None)


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu

    wide = jax.config.read("jax_enable_x64")
    yield gpu
    jax.config.update("jax_enable_x64", wide)
    for name in ("navier_stokes_corrector", "heat_emulator", "networks"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_the_benchmark_says_in_a_line_that_there_is_no_gpu(measured):
    report = measured.benchmark()
    assert report.holds
    assert not report.tables
    (line,) = report.remarks
    assert "JAX finds no GPU here (cpu only), so nothing is measured; --device cpu" in line


def test_bandwidth_counts_what_is_read_and_written(measured, monkeypatch):
    """A kernel that takes a second moves its array twice a second for each application."""
    from benchmarks.harness import Report, Timing

    seconds = {"copy": 4.0, "copy with its sign changed": 2.0, "five-point stencil": 3.0}
    monkeypatch.setattr(
        measured.harness,
        "round_robin",
        lambda calls, rounds: {name: Timing((seconds[name],)) for name in calls},
    )
    report = Report("gpu")
    measured.bandwidth(report, 64, held=True)
    (table,) = report.tables
    rates = {row[0]: row[2] for row in table.rows}
    assert rates["copy"] == pytest.approx(2 * 4 * 64**2 * measured.APART / 4 / 1e9)
    (check,) = report.checks
    # Against the faster copy.
    assert check.value == pytest.approx(2 / 3)
    assert check.holds


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_benchmark_runs_reduced_on_the_cpu(measured):
    report = measured.benchmark(device="cpu")
    assert report.holds
    assert [table.title.split(",")[0] for table in report.tables] == [
        "256² float32",
        "Whole runs",
        "An update under the full solve",
    ]
    rows = [row for table in report.tables for row in table.rows]
    assert len(rows) == 3 + 4 + 2
    assert all(isinstance(cell, str) or np.isfinite(cell) for row in rows for cell in row)
