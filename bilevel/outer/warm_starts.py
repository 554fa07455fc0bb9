"""WarmStarts: for every sample, where its next primal and adjoint solves start."""

from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from bilevel import vector
from bilevel.probe import AdjointProbe


class WarmStart(NamedTuple):
    """Where the solves of some samples start.

    - `value`: the primal's `x0`, leading axis the samples.
    - `adjoint`: the adjoint's `adjoint_guess`, like `value`.
    - `slot`: zeros, like `value`; what its cotangent is becomes the next adjoint.

    >>> start = WarmStarts.zeros(5, jnp.zeros(3)).at(jnp.array([0, 4]))
    >>> start.value.shape, start.adjoint.shape
    ((2, 3), (2, 3))
    """

    value: PyTree
    adjoint: PyTree
    slot: PyTree

    @property
    def probe(self) -> AdjointProbe:
        """For `bl.solve`: it brings the adjoint solution out of the backward pass."""
        # Made where it is used: under vmap of one solve, without it of one for all samples.
        return eqx.tree_at(lambda own: own.value, AdjointProbe.zeros(self.slot), self.slot)


class WarmStarts(eqx.Module):
    """The last solutions of primal and adjoint, one of each for every sample.

    A task keeps them as its `memory`: the loss starts its solves there, stores what it found,
    and hands them back. A sample then starts where the parameters of an epoch ago left it, and
    a few iterations an update are enough. What a truncated solve lacks is made up for in the
    epochs after; the error estimates, which look at residuals, see it.

    - `value`, `adjoint`: like one solution, with a leading axis for the samples.

    Both adjoint and primal start from zero where nothing was stored. Solutions that are not
    finite are not stored.

    >>> import jax, jax.numpy as jnp, bilevel as bl, optax
    >>> system = bl.LinearSystem(lambda theta: theta * jnp.eye(3), lambda theta: jnp.ones(3))
    >>> def loss(theta, batch, fidelity, memory):
    ...     def solve(start):
    ...         return bl.solve(
    ...             system,
    ...             theta,
    ...             start.value,
    ...             adjoint_guess=start.adjoint,
    ...             probe=start.probe,
    ...             solver=bl.Richardson(0.2),
    ...             estimator=bl.Implicit(bl.Richardson(0.2)),
    ...             fidelity=fidelity,
    ...         ).value
    ...
    ...     x = jax.vmap(solve)(memory.at(batch))
    ...     return jnp.mean((x - 0.5) ** 2), memory.stored(batch, x)
    >>> task = bl.Task(
    ...     jnp.ones(()),
    ...     loss,
    ...     batches=[jnp.array([0, 1]), jnp.array([2])],
    ...     memory=WarmStarts.zeros(3, jnp.zeros(3)),
    ...     full=bl.Budget(iterations=3),
    ... )
    >>> run = bl.optimize(task, optax.sgd(0.3), epochs=30, progress=False)
    >>> round(float(run.theta), 2)
    2.0
    """

    value: PyTree
    adjoint: PyTree
    probe: PyTree
    fresh: Bool[Array, " samples"]

    @classmethod
    def zeros(cls, samples: int, like: PyTree) -> Self:
        """Zero for every sample.

        **Arguments:**

        - `samples`: how many there are.
        - `like`: one sample's solution, or anything of its structure, shapes and dtypes.
        """
        value = jax.tree.map(lambda leaf: jnp.zeros((samples, *leaf.shape), leaf.dtype), like)
        return cls.of(value)

    @classmethod
    def of(cls, value: PyTree, adjoint: PyTree | None = None) -> Self:
        """Given starts.

        **Arguments:**

        - `value`: like one solution, with a leading axis for the samples.
        - `adjoint`: likewise; zero by default.

        **Raises:** `ValueError` where leaves have different numbers of samples.
        """
        value = jax.tree.map(jnp.asarray, value)
        counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(value)}
        if len(counts) != 1 or counts == {()}:
            msg = (
                "WarmStarts.of: every leaf of value needs a leading axis, the samples, of the same "
                f"length; got shapes {[jnp.shape(leaf) for leaf in jax.tree.leaves(value)]}."
            )
            raise ValueError(msg)
        zero = vector.zeros_like(value)
        adjoint = zero if adjoint is None else jax.tree.map(jnp.asarray, adjoint)
        (samples,) = counts.pop()
        return cls(value, adjoint, zero, jnp.zeros(samples, bool))

    def __len__(self) -> int:
        """How many samples there are."""
        return self.fresh.shape[0]

    def at(self, index: Int[Array, " batch"] | Int[Array, ""] | int) -> WarmStart:
        """Where the solves of some samples start.

        **Arguments:**

        - `index`: of the samples, one integer or a vector of them, no two alike.

        **Returns:** starts with the axis of `index` in front. Under `jax.vmap` each sample is a
        solve of its own; without it the batch is one system.
        """
        value, adjoint, slots = (
            jax.tree.map(lambda leaf: leaf[jnp.asarray(index)], tree)
            for tree in (self.value, self.adjoint, self.probe)
        )
        value, adjoint = jax.lax.stop_gradient((value, adjoint))
        return WarmStart(value, adjoint, slots)

    def stored(
        self,
        index: Int[Array, " batch"] | Int[Array, ""] | int,
        value: PyTree,
        adjoint: PyTree | None = None,
    ) -> Self:
        """The same with new solutions of some samples.

        **Arguments:**

        - `index`: of the samples, as for `at`.
        - `value`: their primal solutions.
        - `adjoint`: their adjoint solutions, where they are at hand; else the probe's.
        """
        index = jnp.asarray(index)
        kept = self._put("value", index, value)
        if adjoint is not None:
            return kept._put("adjoint", index, adjoint)  # noqa: SLF001
        return eqx.tree_at(lambda own: own.fresh, kept, self.fresh.at[index].set(True))

    def collected(self, reported: PyTree) -> Self:
        """The same with the adjoint solutions that a backward pass reported.

        **Arguments:**

        - `reported`: derivative with respect to the probe, like `adjoint`.
        """

        def choose(new: Array, old: Array) -> Array:
            wide = (-1, *[1] * (old.ndim - 1))
            usable = jnp.isfinite(new).reshape(len(self), -1).all(1)
            return jnp.where((self.fresh & usable).reshape(wide), new, old)

        adjoint = jax.tree.map(choose, reported, self.adjoint)
        return eqx.tree_at(
            lambda own: (own.adjoint, own.fresh),
            self,
            (adjoint, jnp.zeros_like(self.fresh)),
        )

    def _put(self, name: str, index: Array, found: PyTree) -> Self:
        found = jax.lax.stop_gradient(found)

        def put(old: Array, new: Array) -> Array:
            axes = tuple(range(index.ndim, jnp.ndim(new)))
            usable = jnp.isfinite(new).all(axes, keepdims=True)
            return old.at[index].set(jnp.where(usable, new, old[index]).astype(old.dtype))

        kept: Any = getattr(self, name)
        return eqx.tree_at(lambda own: getattr(own, name), self, jax.tree.map(put, kept, found))


def is_warm_starts(node: Any) -> bool:
    """Whether a node of a memory holds warm starts."""
    return isinstance(node, WarmStarts)


def probed(memory: PyTree) -> PyTree:
    """The part of a memory whose cotangents are the adjoint solutions."""
    return [
        node.probe
        for node in jax.tree.leaves(memory, is_leaf=is_warm_starts)
        if is_warm_starts(node)
    ]


def with_probes(memory: PyTree, probes: list[PyTree]) -> PyTree:
    """The memory with these probes in its warm starts."""
    given = iter(probes)

    def replace(node: Any) -> Any:
        if not is_warm_starts(node):
            return node
        return eqx.tree_at(lambda own: own.probe, node, next(given))

    return jax.tree.map(replace, memory, is_leaf=is_warm_starts)


def collected(memory: PyTree, cotangents: list[PyTree]) -> PyTree:
    """The memory after a backward pass, with the adjoint solutions it reported.

    **Arguments:**

    - `memory`: as the loss returned it.
    - `cotangents`: of what `probed` gave, in its order.
    """
    given = iter(cotangents)

    def collect(node: Any) -> Any:
        return node.collected(next(given)) if is_warm_starts(node) else node

    return jax.tree.map(collect, memory, is_leaf=is_warm_starts)
