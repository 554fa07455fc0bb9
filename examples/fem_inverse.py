"""Find a diffusion coefficient from the fields it lets through, with finite elements.

    bilevel compare examples/fem_inverse.py
    bilevel run examples/fem_inverse.py --set refinements=6

The fields solve −∇·(k ∇u) = f on a unit disc, zero on its boundary, for three sources f, in
linear elements on triangles that scikit-fem meshes and assembles.  Each is seen at every vertex.
Adam recovers log k, one number a vertex, from k = 1; the truth has two inclusions.

The matrix goes in as scikit-fem assembled it.  Its entries are linear in k, so a second sparse
matrix maps one number a triangle to the stored entries: gradients cost what the entries cost.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp

import bilevel as bl
import bilevel_pde as pde

try:
    import skfem
    from skfem.models.poisson import laplace
except ImportError as error:
    message = "fem_inverse needs scikit-fem: pip install scikit-fem"
    raise ImportError(message) from error


class Disc:
    """Linear elements on a disc: the operator A(k), and sources.

    Args:
        refinements: how often the four triangles of the first mesh are split in four.

    """

    def __init__(self, refinements: int):
        mesh = skfem.MeshTri.init_circle(refinements)
        basis = skfem.Basis(mesh, skfem.ElementTriP1(), intorder=2)
        self.points = mesh.p.T
        self.triangles = mesh.t.T
        self.inner = mesh.interior_nodes()
        matrix = skfem.condense(laplace.assemble(basis), D=mesh.boundary_nodes(), expand=False)
        self.pattern = pde.from_scipy(matrix)
        self.spread = pde.from_scipy(self._spread(laplace.coo_data(basis)))
        self.edges = self._edges(mesh.facets)
        self._basis = basis

    def _spread(self, local: Any) -> sp.csr_array:
        """From one number a triangle to the entries of `pattern` in their order."""
        count, triangles = len(self.inner), len(self.triangles)
        number = np.full(len(self.points), -1)
        number[self.inner] = np.arange(count)
        rows, columns = number[local.indices[0]], number[local.indices[1]]
        owner = np.arange(len(local.data)) % triangles
        kept = (rows >= 0) & (columns >= 0)
        stored = self.pattern.to_scipy().tocoo()
        places = np.searchsorted(
            stored.row.astype(np.int64) * count + stored.col,
            rows[kept].astype(np.int64) * count + columns[kept],
        )
        shape = (stored.nnz, triangles)
        return sp.csr_array((local.data[kept], (places, owner[kept])), shape=shape)

    def _edges(self, facets: Any) -> pde.AssembledMatrix:
        """Differences along the edges of the mesh, for smoothness."""
        count = facets.shape[1]
        ends = (np.tile(np.arange(count), 2), facets.ravel())
        signs = np.repeat([1.0, -1.0], count)
        return pde.from_scipy(sp.csr_array((signs, ends), shape=(count, len(self.points))))

    def operator(self, theta: jax.Array) -> pde.Operator:
        """A(k) for θ = log k at the vertices, its mean on each triangle."""
        k = jnp.exp(jnp.mean(theta[self.triangles], axis=1))
        return self.pattern.with_values(self.spread @ k, positive_definite=True)

    def sources(self) -> np.ndarray:
        """Three smooth loads, shape (inner vertices, 3)."""

        def load(center: tuple[float, float]) -> np.ndarray:
            def bump(v: np.ndarray, w: Any) -> np.ndarray:
                squares = (w.x[0] - center[0]) ** 2 + (w.x[1] - center[1]) ** 2
                return 10.0 * np.exp(-4.0 * squares) * v

            return skfem.LinearForm(bump).assemble(self._basis)[self.inner]

        angles = 2 * np.pi * np.arange(3) / 3
        return np.stack([load((0.5 * np.cos(a), 0.5 * np.sin(a))) for a in angles], axis=1)


def task(refinements: int = 5, smoothness: float = 1e-7, epochs: int = 150) -> bl.Task:
    """Recover the coefficient on a mesh of 4^refinements · 4 triangles.

    Args:
        refinements: of the mesh; 5 makes 2,113 vertices.
        smoothness: weight of the squared differences along edges.
        epochs: outer steps.

    """
    disc = Disc(refinements)
    x, y = disc.points.T
    inclusions = 1.0 * ((x - 0.35) ** 2 + y**2 < 0.09) - 0.7 * ((x + 0.4) ** 2 + y**2 < 0.06)
    truth = jnp.asarray(inclusions, jnp.result_type(float))
    sources = jnp.asarray(disc.sources(), truth.dtype)
    problem = bl.LinearSystem(disc.operator, sources)
    start = jnp.zeros_like(sources)
    wanted = bl.solve(problem, truth, start, solver=pde.SparseDirect()).value
    inner = bl.ConjugateGradient(preconditioner=bl.JacobiPreconditioner())

    def loss(theta: jax.Array, batch: None, fidelity: bl.Fidelity) -> jax.Array:
        del batch
        fields = bl.solve(
            problem,
            theta,
            start,
            solver=inner,
            estimator=bl.Implicit(solver=inner),
            fidelity=fidelity,
        ).value
        misfit = jnp.sum((fields - wanted) ** 2) / jnp.sum(wanted**2)
        return misfit + smoothness * jnp.sum((disc.edges @ theta) ** 2)

    def validate(theta: jax.Array) -> jax.Array:
        return jnp.linalg.norm(theta - truth) / jnp.linalg.norm(truth)

    return bl.Task(
        jnp.zeros_like(truth),
        loss,
        validate=validate,
        name="fem inverse",
        metric_name="relative error of log k",
        optimizer=optax.adam(0.1),
        epochs=epochs,
        ladder=bl.Ladder.iterations(start=50, step=10, stop=150),
        full=bl.Budget(iterations=150),
        policies=("full", "prdp"),
    )


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
