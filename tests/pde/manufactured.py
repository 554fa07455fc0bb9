"""Problems with known solutions: exact fields, right-hand sides and boundary values."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg as spla

import bilevel_pde as pde

D, N, P, R = pde.Dirichlet(), pde.Neumann(), pde.Periodic(), pde.Robin(1.5, 0.5)


def normal(shape, seed=0):
    """Random numbers that are the same in any order of tests."""
    return np.random.default_rng(seed).standard_normal(shape)


def smooth(p):
    """Neither odd nor even at any side."""
    return jnp.sin(1.3 * p[0] + 0.4) + sum((0.5 + d) * x**2 + x for d, x in enumerate(p))


def around(p):
    """Periodic along every axis, with period one."""
    return sum(jnp.exp(jnp.sin(2 * jnp.pi * x + 0.3 + d)) for d, x in enumerate(p))


def at(grid, function):
    """A function of a point at those of a grid."""
    mesh = np.meshgrid(*map(np.asarray, grid.coordinates()), indexing="ij")
    values = jax.jit(jax.vmap(function))(np.stack([x.ravel() for x in mesh], -1))
    return jnp.asarray(np.asarray(values).reshape(grid.shape))


def boundary_values(grid, exact):
    """What each side's condition makes of the exact field."""
    values = {}
    for axis, pair in enumerate(grid.boundary):
        for side, kind in enumerate(pair):
            if isinstance(kind, pde.Periodic):
                continue
            lines = [np.asarray(x) for x in grid.coordinates()]
            lines[axis] = np.array([grid.origin[axis] + side * grid.extent[axis]])
            points = np.stack([x.ravel() for x in np.meshgrid(*lines, indexing="ij")], -1)
            u, slopes = jax.jit(jax.vmap(jax.value_and_grad(exact)))(points)
            u, slope = np.asarray(u), np.asarray(slopes)[:, axis] * (1 if side else -1)
            value = {
                pde.Dirichlet: lambda u, s, k: u,
                pde.Neumann: lambda u, s, k: s,
                pde.Robin: lambda u, s, k: k.value * u + k.slope * s,
            }[type(kind)](u, slope, kind)
            shape = tuple(n for d, n in enumerate(grid.shape) if d != axis)
            values[axis, side] = value.reshape(shape)
    return values


def error(operator, grid, exact, source, values=None):
    """Of the solution, root mean square."""
    values = boundary_values(grid, exact) if values is None else values
    rhs = at(grid, source) - operator.boundary_term(values)
    matrix, rhs = operator.to_scipy().tocsc(), np.asarray(rhs).ravel()
    solution = (iterated if grid.ndim == 3 else spla.spsolve)(matrix, rhs)
    return np.sqrt(np.mean((solution - np.asarray(at(grid, exact)).ravel()) ** 2))


def iterated(matrix, rhs):
    """In three dimensions the factors of a direct solve would fill hours and memory."""
    factors = spla.spilu(matrix, drop_tol=1e-3, fill_factor=8)
    inverse = spla.LinearOperator(matrix.shape, factors.solve)
    solution, failed = spla.bicgstab(matrix, rhs, rtol=1e-11, maxiter=500, M=inverse)
    assert not failed
    return solution


def slope(errors):
    """Of errors on grids twice as fine each."""
    return np.log2(errors[-2] / errors[-1])
