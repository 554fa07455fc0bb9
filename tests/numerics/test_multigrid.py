"""The numerical matrix for multigrid, where it applies: diffusion on a regular grid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from tests.core.compiling import jitted
from tests.marks import others_slow

CELLS = 16
RTOL = {"float32": 1e-5, "float64": 1e-10}
SOLVERS = {
    "ConjugateGradient": bl.ConjugateGradient(preconditioner=pde.Multigrid()),
    "GMRES": bl.GMRES(preconditioner=pde.Multigrid()),
    "Richardson": bl.Richardson(1.0, preconditioner=pde.Multigrid()),
}


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Conductivities and sources: smooth, jumping ever more, zero, not finite."""
    random = np.random.default_rng(0)
    shape = (CELLS, CELLS)
    source = random.standard_normal(shape)
    block = np.zeros(shape)
    block[4:9, 6:12] = 1.0
    found = {"smooth": (np.exp(0.3 * random.standard_normal(shape)), source)}
    found |= {
        f"jump of 1e{power}": (10.0 ** (power * block), source) for power in (2, 4, 8, 12, 16)
    }
    found["zero source"] = (np.ones(shape), 0 * source)
    found["zero conductivity"] = (np.zeros(shape), source)
    for name, bad in (("NaN", np.nan), ("infinity", np.inf)):
        spoilt = np.ones(shape)
        spoilt[3, 3] = bad
        found[f"{name} in k"] = (spoilt, source)
        poured = source.copy()
        poured[3, 3] = bad
        found[f"{name} in f"] = (np.ones(shape), poured)
    return found


@pytest.mark.parametrize("dtype", others_slow(["float32", "float64"]))
@pytest.mark.parametrize("name", others_slow(SOLVERS))
def test_multigrid_says_no_more_than_is_true(name, dtype, count):
    grid = pde.Grid((CELLS, CELLS), centering="cell", dtype=dtype)
    problem = bl.LinearSystem(
        lambda theta: pde.Diffusion(grid, theta[0]),
        lambda theta: theta[1],
        symmetric=True,
        positive_definite=True,
    )
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((CELLS, CELLS)), dtype)
    budget = bl.Budget(60, rtol=RTOL[dtype])

    def value(theta: Any, probe: Any) -> Any:
        solution = bl.solve(
            problem,
            theta,
            jnp.zeros_like(theta[1]),
            solver=SOLVERS[name],
            estimator=bl.Implicit(SOLVERS[name]),
            budget=budget,
            adjoint_budget=budget,
            probe=probe,
        )
        left = problem.at(theta).residual(solution.value)  # here, for Diffusion refuses bad numbers
        return jnp.sum(weight * solution.value), (solution, jnp.linalg.norm(left))

    derivative = jitted(jax.grad(value, argnums=(0, 1), has_aux=True))
    violations = []
    for case, data in cases().items():
        theta = tuple(jnp.asarray(part, dtype) for part in data)
        (gradient, report), (solution, residual) = derivative(theta, bl.Probe.zeros())
        status = bl.Status(int(solution.status))
        size = float(jnp.sqrt(sum(jnp.sum(part**2) for part in gradient)))
        where = f"{name}, {dtype}, {case}: {status.name}, |gradient| {size:.1e}"
        if status is bl.Status.CONVERGED and not residual <= 10 * float(solution.tolerance):
            violations.append(f"{where}, residual {residual:.1e}")
        if ("NaN" in case or "infinity" in case or "zero c" in case) and not status.failed:
            violations.append(f"{where}: not failed")
        if (status.failed or int(report.failures)) and np.isfinite(size):
            violations.append(f"{where}: finite after a failure")
        if size == 0:
            violations.append(f"{where}: zero")
    count(len(cases()), violations)
