"""One application of a sparse operator: this library, SciPy and jax.experimental.sparse."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.experimental import sparse
from scipy.spatial import Delaunay

import bilevel_pde as pde
from benchmarks import harness
from benchmarks.harness import Report, Timing

SCIPY, BCOO, BCSR = "SciPy CSR", "JAX BCOO", "JAX BCSR"

LOOPED = ", in a loop"

LOOP = 20
"""Applications in one compiled loop, where no result has to be put into new memory."""

ROW = 5
"""Applications in a row, as a solver makes them: the first finds the others' data in the cache."""


@dataclass(frozen=True)
class Case:
    """A matrix, and the operators that stand for it."""

    name: str
    matrix: sp.csr_array
    operators: dict[str, pde.Operator]
    limits: dict[str, dict[str, float]]


def five_diagonals(points: int) -> sp.csr_array:
    """The matrix of a diffusion with a varying coefficient on points² unknowns."""
    random = np.random.default_rng(0)
    size = points * points
    along = random.uniform(1.0, 2.0, size - 1)
    along[points - 1 :: points] = 0.0
    across = random.uniform(1.0, 2.0, size - points)
    bands: Any = [-along, -across]
    lower = sp.diags_array(bands, offsets=[-1, -points], shape=(size, size))
    matrix = sp.csr_array(lower + lower.T)
    matrix = sp.csr_array(sp.diags_array(1.0 - matrix.sum(axis=1)) + matrix)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix


def triangles(points: int) -> sp.csr_array:
    """The graph Laplacian, plus 1, of a Delaunay mesh of random points in random order."""
    random = np.random.default_rng(0)
    mesh = Delaunay(random.random((points, 2))).simplices
    edges = np.concatenate([mesh[:, [0, 1]], mesh[:, [1, 2]], mesh[:, [2, 0]]])
    ends = np.concatenate([edges, edges[:, ::-1]])
    adjacency = sp.coo_array((np.ones(len(ends)), tuple(ends.T)), shape=(points, points)).tocsr()
    matrix = sp.csr_array(sp.diags_array(1.0 + adjacency.sum(axis=1)) - adjacency)
    matrix.sort_indices()
    return matrix


def cases(quick: bool) -> list[Case]:
    """A constant stencil, diagonals, and triangles."""
    points, vertices = (128, 10_000) if quick else (1024, 250_000)
    grid = pde.Grid((points, points), (1.0, 1.0))
    stencil = pde.laplacian(grid)
    constant = stencil.to_scipy()
    varying, mesh = five_diagonals(points), triangles(vertices)
    general = _general(mesh)
    return [
        Case(
            f"constant five-point stencil, {points}²",
            constant,
            {"Stencil": stencil, "from_scipy": pde.from_scipy(constant)},
            {"Stencil": {SCIPY: 7.0, BCOO: 12.0, BCSR: 20.0}},
        ),
        Case(
            f"five diagonals, {points}²",
            varying,
            {"from_scipy": pde.from_scipy(varying)},
            {"from_scipy": {SCIPY: 4.5}},
        ),
        Case(
            f"triangles, {vertices:,} random points",
            mesh,
            {
                "from_scipy": pde.from_scipy(mesh),
                "general values": general,
                "general values, transposed once": general.transposed(),
                "as segment sum": pde.from_scipy(mesh, format="segment_sum"),
            },
            {"from_scipy": {SCIPY: 2.0}},
        ),
    ]


def _general(matrix: sp.csr_array) -> pde.Operator:
    """The same structure without its symmetry, so that the transpose is another matrix."""
    random = np.random.default_rng(1)
    scaled = matrix.copy()
    scaled.data = scaled.data * random.uniform(0.5, 1.5, scaled.nnz)
    return pde.from_scipy(scaled)


def measure(case: Case, rounds: int) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time every candidate.

    **Returns:** timings, and the largest difference to SciPy over the largest entry of the
    result, for candidates that stand for the same matrix.
    """
    matrix = case.matrix
    v = np.random.default_rng(2).standard_normal(matrix.shape[1])
    given = jnp.asarray(v)
    expected = matrix @ v
    candidates: dict[str, Callable[[], Any]] = {SCIPY: lambda: matrix @ v}
    for name, operator in case.operators.items():
        candidates[name] = _applied(lambda o, v: o.matvec(_field(o, v)), operator, given)
        candidates[f"{name}, transpose"] = _applied(
            lambda o, v: o.rmatvec(_field(o, v)), operator, given
        )
        candidates[f"{name}, gradient in v"] = _applied(_gradient, operator, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coordinate, compressed = sparse.BCOO.from_scipy_sparse(matrix), _compressed(matrix)
    for name, stored in ((BCOO, coordinate), (BCSR, compressed)):
        candidates[name] = _applied(lambda m, v: m @ v, stored, given)
    candidates["copy of v"] = _applied(lambda _, v: v + 1.0, None, given)
    errors = {
        name: float(np.abs(np.ravel(candidates[name]()) - expected).max() / np.abs(expected).max())
        for name in (*case.operators, BCOO, BCSR)
        if "general" not in name
    }
    scale = 1.0 / float(abs(matrix).sum(axis=1).max())
    loops = {SCIPY: _scipy_loop(matrix, v, scale)}
    for name, operator in case.operators.items():
        loops[name] = _loop(operator, given, scale)
    repeated = {name: _in_a_row(function) for name, function in candidates.items()}
    timings = harness.round_robin(repeated, rounds=rounds)
    each = {k: Timing(tuple(s / ROW for s in timing.seconds)) for k, timing in timings.items()}
    looped = harness.round_robin(loops, rounds=rounds)
    for name, timing in looped.items():
        each[f"{name}{LOOPED}"] = Timing(tuple(s / LOOP for s in timing.seconds))
    return each, errors


def _loop(operator: Any, v: Any, scale: float) -> Callable[[], Any]:
    def applied(operator: Any, v: Any) -> Any:
        return jax.lax.fori_loop(0, LOOP, lambda _, v: scale * operator.matvec(v), v)

    return _applied(lambda o, v: applied(o, _field(o, v)), operator, v)


def _scipy_loop(matrix: sp.csr_array, v: Any, scale: float) -> Callable[[], Any]:
    def run() -> Any:
        result = v
        for _ in range(LOOP):
            result = matrix @ result
            result *= scale
        return result

    return run


def _in_a_row(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        for _ in range(ROW - 1):
            jax.block_until_ready(function())
        return function()

    return run


def _applied(function: Callable[[Any, Any], Any], operator: Any, v: Any) -> Callable[[], Any]:
    compiled = jax.jit(function)
    return lambda: compiled(operator, v)


def _field(operator: Any, v: Any) -> Any:
    return v.reshape(operator.like.shape)


def _gradient(operator: Any, v: Any) -> Any:
    v = _field(operator, v)
    return jax.vjp(operator.matvec, v)[1](v)


def _compressed(matrix: sp.csr_array) -> Any:
    parts = (matrix.data, matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32))
    data, indices, indptr = map(jnp.asarray, parts)
    return sparse.BCSR((data, indices, indptr), shape=matrix.shape)


def benchmark(quick: bool = False) -> Report:
    """Time applications of each, in turn."""
    report = Report("operators")
    for case in cases(quick):
        report.say(case.name)
        timings, errors = measure(case, rounds=10 if quick else 20)
        table = report.table(
            f"{case.name}: one application, float64", "candidate", "µs", "SciPy / it", "error"
        )
        for name, timing in timings.items():
            ratio = timings[f"{SCIPY}{LOOPED}" if LOOPED in name else SCIPY].ratio(timing)
            table.add(name, 1e6 * timing.median, ratio, errors.get(name))
        for name, operator in case.operators.items():
            if isinstance(operator, pde.AssembledMatrix):
                report.remarks.append(f"{case.name}, {name}: {operator!r}")
        worst = max(errors.values())
        report.check(f"{case.name}: same product as SciPy's", worst, 1e-12)
        if quick:
            continue
        for name, limits in case.limits.items():
            for other, limit in limits.items():
                ratio = timings[other].ratio(timings[name])
                report.check(f"{case.name}: {other} / {name}", ratio, limit, at_least=True)
        if "Stencil" in timings:
            share = timings["copy of v"].ratio(timings["Stencil"])
            report.check("stencil's bandwidth over a copy's", share, 0.75, at_least=True)
    return report
