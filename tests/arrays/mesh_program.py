"""What is computed on many devices and on one, for tests that compare the two.

As a program: `WHAT` on all simulated devices, or `WHAT ADDRESS PROCESSES INDEX` as one of several
processes; it prints a line of JSON.
"""

import json
import sys
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
import bilevel_pde as pde
from bilevel_arrays import mesh as over

Mesh = jax.sharding.Mesh | None


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def placed(array: np.ndarray, mesh: Mesh, axes: Any) -> jax.Array:
    return jnp.asarray(array) if mesh is None else over.place(array, mesh, axes)


def cut(operator: Any, mesh: Mesh, axes: Any, gather_below: int = 64) -> Any:
    if mesh is None:
        return operator
    return over.partition(operator, mesh, axes, gather_below=gather_below)


def poisson(mesh: Mesh, axes: Any = ("devices", None)) -> dict[str, Any]:
    """Poisson in two dimensions by CG with multigrid, and the gradient in a few sources."""
    grid = pde.Grid((32, 32))
    f = placed(numbers(grid.shape), mesh, axes)
    modes = placed(numbers((32, 3), 1), mesh, ("devices",) if mesh else None)
    solver = bl.ConjugateGradient(preconditioner=pde.Multigrid())
    budget = bl.Budget(50, rtol=1e-10)

    @jax.jit
    def solve(f: jax.Array) -> bl.Solution:
        problem = bl.LinearSystem(cut(-pde.laplacian(grid), mesh, axes), f)
        return bl.solve(problem, None, 0 * f, solver=solver, budget=budget)

    @jax.jit
    def gradient(theta: jax.Array, f: jax.Array, modes: jax.Array) -> Any:
        problem = bl.LinearSystem(
            lambda theta: cut(-pde.laplacian(grid), mesh, axes),
            lambda theta: f + (modes * theta) @ modes.T,
        )
        result = bl.hypergradient(
            lambda x, theta: jnp.sum(x**2), problem, theta, 0 * f, solver=solver,
            estimator=bl.Implicit(solver=solver), budget=budget, adjoint_budget=budget,
        )  # fmt: skip
        return result.gradient, result.primal.iterations, result.adjoint.iterations

    solution = solve(f)
    slope, primal, adjoint = gradient(jnp.arange(1.0, 4.0), f, modes)
    return {
        "iterations": [int(solution.iterations), int(primal), int(adjoint)],
        "status": int(solution.status),
        "value": over.gather(solution.value).tolist(),
        "gradient": np.asarray(slope).tolist(),
    }


ESTIMATORS = {
    "implicit": (bl.ConjugateGradient(), bl.Implicit(bl.ConjugateGradient())),
    "unrolled": (bl.ConjugateGradient(), bl.Unrolled()),
    "neumann": (bl.Jacobi(), bl.Neumann()),
}


def heat(mesh: Mesh, estimator: str, axes: Any = ("devices", None, None)) -> dict[str, Any]:
    """Heat in three dimensions with a diffusivity field, and the gradient in that field."""
    grid = pde.Grid((8, 8, 8), boundary=[pde.Dirichlet(), pde.Neumann(), pde.Periodic()],
                    centering="cell")  # fmt: skip
    solver, by = ESTIMATORS[estimator]
    stepper = cut(pde.Heat(grid, 1.0, 1e-3, solver=solver, estimator=by), mesh, axes)
    u = placed(numbers(grid.shape), mesh, axes)
    k = placed(np.exp(0.3 * numbers(grid.shape, 1)), mesh, axes)

    @partial(jax.value_and_grad, argnums=1, has_aux=True)
    def loss(u: jax.Array, k: jax.Array) -> Any:
        states, solution = pde.rollout_with_solutions(
            stepper, u, 2, theta={"diffusivity": k},
            budget=bl.Budget(40, rtol=1e-8), adjoint_budget=bl.Budget(40, rtol=1e-8),
        )  # fmt: skip
        return jnp.sum(states[-1] ** 3), (states[-1], solution.iterations)

    (value, (state, iterations)), slope = jax.jit(loss)(u, k)
    return {
        "iterations": np.asarray(iterations).tolist(),
        "loss": float(value),
        "value": over.gather(state).tolist(),
        "gradient": over.gather(slope).tolist(),
    }


def results(mesh: Mesh) -> dict[str, Any]:
    return {"poisson": poisson(mesh), **{name: heat(mesh, name) for name in ESTIMATORS}}


def on_meshes() -> dict[str, Any]:
    """All of it on meshes of 1, 2, 4 and 8 devices."""
    counts = (1, 2, 4, 8)
    return {str(n): results(over.device_mesh(devices=jax.devices()[:n])) for n in counts}


CONDITIONS = {
    "dirichlet": {"boundary": pde.Dirichlet()},
    "cells": {"boundary": [(pde.Dirichlet(), pde.Neumann()), pde.Periodic()], "centering": "cell"},
    "periodic": {"boundary": pde.Periodic()},
    "slopes": {"boundary": [(pde.Dirichlet(), pde.Neumann()), pde.Robin(1.0, 0.5)]},
}


def operators(grid: pde.Grid) -> dict[str, pde.Operator]:
    """Operators of every kind on a grid, with coefficients that are fields."""
    k = np.exp(0.5 * numbers(grid.shape, 3))
    wide = {(1, 1): k, (-1, -1): 2.0, (0, 1): k, (2, 0): 1.0, (0, 0): -1.0}
    found: dict[str, pde.Operator] = {
        "laplacian": pde.laplacian(grid),
        "weighted": pde.laplacian(grid).weighted(),
        "diffusion": pde.Diffusion(grid, k),
        "harmonic": pde.Diffusion(grid, (k, 2 * k), mean="harmonic", reaction=k).weighted(),
        "faces": pde.Diffusion(grid, tuple(map(np.ones, map(grid.face_shape, (0, 1)))), at="faces"),
        "advection": pde.advection(grid, (k, 1.0)),
        "transposed": pde.advection(grid, (k, 1.0)).T,
        "step": pde.identity(grid) + 0.1 * pde.Diffusion(grid, 2.0),
        "sum": pde.advection(grid, (1.0, -0.5)) + 2.0 * (pde.laplacian(grid) @ pde.laplacian(grid)),
    }  # fmt: skip
    if all(grid.is_periodic(axis) for axis in range(2)):
        found |= {"wide": pde.Stencil(grid, wide), "biharmonic": pde.biharmonic(grid)}
    if all(np.all(weight == 1) for weight in grid.weights()):
        found["mean"] = pde.Diffusion(grid, k) + 3.0 * pde.Mean(grid)
    return found


MESHES = {
    "slabs": ((8,), "x", ("x", None)),
    "columns": ((4, 2), ("x", "y"), (None, "x")),
    "blocks": ((4, 2), ("x", "y"), ("x", "y")),
}


def matvec(operator: Any, v: Any, *, adjoint: bool = False) -> Any:
    return operator.rmatvec(v) if adjoint else operator.matvec(v)


def sent(function: Any, *arguments: Any) -> int:
    found = over.collectives(function, *arguments)
    return sum(one.sent for one in found if one.kind == "collective-permute")


def applied() -> dict[str, Any]:
    """The largest relative difference from one device of everything an operator does."""
    found: dict[str, Any] = {}
    cases = [("blocks", name) for name in CONDITIONS]
    cases += [(place, name) for place in ("slabs", "columns") for name in ("dirichlet", "periodic")]
    for place, name in cases:
        shape, axis_names, axes = MESHES[place]
        mesh = over.device_mesh(shape, axis_names)
        grid = pde.Grid((32, 16), **CONDITIONS[name])
        u = jnp.asarray(numbers(grid.shape))
        v = over.place(u, mesh, axes)
        for kind, whole in operators(grid).items():
            part = over.partition(whole, mesh, axes)
            pairs = [(whole.matvec(u), part.matvec(v)), (whole.rmatvec(u), part.rmatvec(v))]
            pairs.append((whole.T.matvec(u), part.T.matvec(v)))
            if part.diagonal() is not None:
                pairs.append((whole.diagonal(), part.diagonal()))
            defect = max(
                float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(a)))
                for a, b in pairs
            )
            traffic = over.halo_traffic(part).total
            counted = [
                sent(partial(matvec, part), v),
                sent(partial(matvec, part, adjoint=True), v),
            ]
            found[f"{place} {name} {kind}"] = [defect, traffic, *counted]
    return found


def derived() -> dict[str, Any]:
    """JVPs, VJPs and vmap of an application in its field and its coefficient."""
    mesh, axes = over.device_mesh((4, 2)), ("x", "y")
    grid = pde.Grid((16, 8), boundary=[pde.Periodic(), pde.Neumann()], centering="cell")
    k, dk, u, du, w = (numbers(grid.shape, seed) for seed in range(5))
    k = np.exp(k)

    def apply(mesh: Mesh, k: Any, u: Any) -> Any:
        return cut(pde.Diffusion(grid, k) + pde.advection(grid, (k, 1.0)), mesh, axes).matvec(u)

    def all_of(mesh: Mesh) -> dict[str, Any]:
        a, da, v, dv, y = (placed(array, mesh, axes) for array in (k, dk, u, du, w))
        many = placed(np.stack([u, du, w]), mesh, (None, *axes))
        function = partial(apply, mesh)

        def squares(k: Any, u: Any) -> Any:
            return jnp.sum(function(k, u) ** 2)

        return {
            "jvp": jax.jit(lambda *x: jax.jvp(function, x[:2], x[2:])[1])(a, v, da, dv),
            "vjp": jax.jit(lambda *x: jax.vjp(function, *x[:2])[1](x[2]))(a, v, y),
            "vmap": jax.jit(jax.vmap(function, (None, 0)))(a, many),
            "both": jax.jit(jax.vmap(jax.grad(squares), (None, 0)))(a, many),
        }  # fmt: skip

    def through_cycles(mesh: Mesh) -> Any:
        """The gradient of a few unrolled iterations, which goes through the cycles."""
        solver = bl.ConjugateGradient(preconditioner=pde.Multigrid())

        def loss(f: Any) -> Any:
            operator = cut(pde.identity(grid) - pde.laplacian(grid), mesh, axes, 8)
            problem = bl.LinearSystem(operator, lambda f: f)
            solution = bl.solve(problem, f, 0 * f, solver=solver, estimator=bl.Unrolled(),
                                budget=bl.Budget(2))  # fmt: skip
            return jnp.sum(solution.value**3)

        return jax.jit(jax.grad(loss))(placed(u, mesh, axes))

    def carried(mesh: Mesh) -> Any:
        """A step of advection and diffusion, and its gradient in the velocity."""
        stepper = cut(pde.AdvectionDiffusion(grid, (1.0, 0.5), 0.1, 1e-2), mesh, axes)

        def loss(velocity: Any, u: Any) -> Any:
            moved = stepper.step(u, theta={"velocity": (velocity, 0.5)}, budget=bl.Budget(20))
            return jnp.sum(moved**2), moved

        return jax.jit(jax.grad(loss, has_aux=True))(placed(k, mesh, axes), placed(u, mesh, axes))

    one, eight = all_of(None), all_of(mesh)
    one["carried"], eight["carried"] = carried(None), carried(mesh)
    one["cycles"], eight["cycles"] = through_cycles(None), through_cycles(mesh)
    return {
        name: max(
            float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(a)))
            for a, b in zip(*map(jax.tree.leaves, (one[name], eight[name])), strict=True)
        )
        for name in one
    }


PRECONDITIONED: dict[str, tuple[str, Any, Any, Any]] = {
    "rediscretised": ("cells", pde.Multigrid(), bl.ConjugateGradient, "diffusion"),
    "tables": ("dirichlet", pde.Multigrid(), bl.ConjugateGradient, "diffusion"),
    "galerkin": ("cells", pde.Multigrid(coarse="galerkin"), bl.ConjugateGradient, "diffusion"),
    "W": ("slopes", pde.Multigrid(pde.GaussSeidel(), "W"), bl.BiCGStab, "step"),
    "F": ("periodic", pde.Multigrid(pde.WeightedJacobi(), "F"), bl.GMRES, "mean"),
    "mean": ("periodic", pde.Multigrid(), bl.ConjugateGradient, "mean"),
    "chebyshev": ("cells", pde.ChebyshevSmoother(), bl.ConjugateGradient, "diffusion"),
    "gauss_seidel": ("dirichlet", pde.GaussSeidel(), bl.GMRES, "step"),
}


def preconditioned() -> dict[str, Any]:
    """Iterations on one and on eight devices, and the difference of the solutions."""
    found: dict[str, Any] = {}
    mesh, axes = over.device_mesh((4, 2)), ("x", "y")
    for name, (condition, preconditioner, kind, which) in PRECONDITIONED.items():
        grid = pde.Grid((32, 32), **CONDITIONS[condition])
        whole = operators(grid)[which]
        f = numbers(grid.shape)
        solver = kind(preconditioner=preconditioner)

        @jax.jit
        def solve(operator: Any, f: Any, solver: Any = solver) -> bl.Solution:
            problem = bl.LinearSystem(operator, f)
            return bl.solve(problem, None, 0 * f, solver=solver, budget=bl.Budget(100, rtol=1e-8))

        one = solve(whole, jnp.asarray(f))
        many = solve(cut(whole, mesh, axes), over.place(f, mesh, axes))
        a, b = np.asarray(one.value), np.asarray(many.value)
        found[name] = [
            int(one.status), int(one.iterations), int(many.iterations),
            float(np.max(np.abs(a - b)) / np.max(np.abs(a))),
        ]  # fmt: skip
    return found


def stepped() -> dict[str, Any]:
    """What a heat step sends, by the loops it is sent in, in multiples of the surface."""
    mesh, axes = over.device_mesh((2, 2, 2)), ("x", "y", "z")
    grid = pde.Grid((16, 8, 8))
    stepper = over.partition(pde.Heat(grid, 1.0, 1e-3), mesh, axes)
    fields = [over.place(np.ones(grid.shape), mesh, axes) for _ in range(2)]

    def step(u: jax.Array, k: jax.Array, budget: bl.Budget) -> jax.Array:
        return stepper.step(u, theta={"diffusivity": k}, budget=budget)

    budget = jax.tree.map(jnp.asarray, bl.Budget(5, 0.0, 0.0))
    surface = over.halo_traffic(stepper.matrix()).total
    by_depth: Counter[int] = Counter()
    kinds: set[str] = set()
    for one in over.collectives(step, *fields, budget):
        kinds.add(one.kind)
        by_depth[one.depth] += one.sent
    return {"surface": surface, "depths": by_depth, "kinds": sorted(kinds)}


def cycled() -> dict[str, Any]:
    """What a V cycle sends."""
    mesh, axes = over.device_mesh((4, 2)), ("x", "y")
    grid = pde.Grid((32, 32), boundary=pde.Periodic())
    operator = cut(pde.identity(grid) - pde.laplacian(grid), mesh, axes, 100)
    problem = bl.LinearSystem(operator, jnp.ones(grid.shape))
    v = over.place(numbers(grid.shape), mesh, axes)

    def cycle(v: jax.Array) -> jax.Array:
        return bl.solve(problem, None, v, solver=bl.Richardson(1.0, preconditioner=pde.Multigrid()),
                        budget=bl.Budget(3)).value  # fmt: skip

    by_kind: Counter[str] = Counter()
    for one in over.collectives(cycle, v):
        by_kind[f"{one.kind} {one.depth}"] += one.sent or one.bytes
    return dict(by_kind)


def refused() -> dict[str, str]:
    """What is said of meshes and arrays that do not fit."""
    mesh = over.device_mesh((4, 2))
    grid = pde.Grid((12, 10))
    laplace, ring = pde.laplacian(grid), pde.biharmonic(pde.Grid((8, 16), boundary=pde.Periodic()))
    half = over.device_mesh(devices=jax.devices()[:2])
    elsewhere = over.place(np.ones(grid.shape), half, "devices")
    part = over.partition(laplace, mesh, ("x", "y"))
    attempts = {
        "not divided": lambda: over.partition(laplace, mesh, ("y", "x")),
        "too thin": lambda: over.partition(ring, over.device_mesh(8), "devices"),
        "elsewhere": lambda: part @ elsewhere,
        "elsewhere, transposed": lambda: over.partition(
            pde.advection(grid, (1.0, 1.0)), mesh).rmatvec(elsewhere),
        "another layout": lambda: part + over.partition(laplace, mesh, ("x", None)),
        "heat": lambda: over.partition(pde.Heat(pde.Grid(10), 1.0, 0.1), mesh, "x"),
        "place": lambda: over.place(np.ones((6, 6)), mesh, ("x", "y")),
        "shape": lambda: over.device_mesh((3, 2)),
    }  # fmt: skip
    found: dict[str, str] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def quick() -> dict[str, Any]:
    """A little of everything, without a solver that takes long to compile."""
    mesh, axes = over.device_mesh((4, 2)), ("x", "y")
    grid = pde.Grid((16, 8), **CONDITIONS["cells"])
    k = np.exp(0.5 * numbers(grid.shape))
    whole = pde.Diffusion(grid, k) + 2.0 * pde.advection(grid, (k, 1.0))
    part = over.partition(whole, mesh, axes)
    u, f = numbers(grid.shape, 1), numbers(grid.shape, 2)
    v = over.place(u, mesh, axes)
    diffusion = pde.Diffusion(grid, k)

    @jax.jit
    def solve(operator: Any, f: jax.Array) -> bl.Solution:
        problem = bl.LinearSystem(operator, f)
        return bl.solve(problem, None, 0 * f, solver=bl.ConjugateGradient(),
                        budget=bl.Budget(100, rtol=1e-10))  # fmt: skip

    one = solve(diffusion, jnp.asarray(f))
    many = solve(cut(diffusion, mesh, axes), over.place(f, mesh, axes))
    return {
        "refused": refused(),
        "matvec": defect(whole.matvec(jnp.asarray(u)), part.matvec(v)),
        "rmatvec": defect(whole.rmatvec(jnp.asarray(u)), part.rmatvec(v)),
        "iterations": [int(one.iterations), int(many.iterations)],
        "value": defect(one.value, many.value),
        "lies": str(many.value.sharding.spec),
        "traffic": over.halo_traffic(part).total,
        "sent": sent(partial(matvec, part), v),
    }


def defect(expected: Any, found: Any) -> float:
    expected = np.asarray(expected)
    return float(np.max(np.abs(expected - np.asarray(found))) / np.max(np.abs(expected)))


def main(what: str, address: str = "", processes: str = "1", index: str = "0") -> None:
    jax.config.update("jax_enable_x64", True)
    # Programs that run at the same time on simulated devices may wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if address:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(index))
        found = results(over.device_mesh())
    else:
        found = globals()[what]()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
