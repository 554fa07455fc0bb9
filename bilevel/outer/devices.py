"""Devices: how a run's parameters and batches lie over several of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from bilevel.outer.checkpoint import is_array
from bilevel.outer.processes.shared import is_scattered, lay, several
from bilevel.refinement.fidelity import Fidelity
from bilevel.signature import brief


class DevicesError(ValueError):
    """There are fewer devices than were asked for, or they do not divide what they shall share."""


AXIS = "batch"
"""Of the mesh that is made where a number of devices is asked for."""


def mesh_of(devices: int | Mesh | None, *, batches: bool) -> Mesh | None:
    """The mesh whose first axis the batches of a run are split along; `None` for one device.

    **Arguments:**

    - `devices`: so many of each process's, or a mesh; `None` for one device in a single process
        and for all there are in several.
    - `batches`: whether there is anything to split.

    **Raises:** `DevicesError` where there are fewer devices, `TypeError` for anything else.
    """
    if isinstance(devices, Mesh):
        return devices if batches and devices.size > 1 else None
    whole = isinstance(devices, int | np.integer) and not isinstance(devices, bool)
    if devices is not None and not whole:
        msg = (
            f"optimize: devices should be a number of devices or a jax.sharding.Mesh, got "
            f"{brief(devices)}."
        )
        raise TypeError(msg)
    if devices is not None and devices < 1:
        msg = f"optimize: devices should be 1 or more, got {devices}."
        raise ValueError(msg)
    if devices is None and not several():
        return None
    chosen = _of_each_process(devices)
    return Mesh(np.array(chosen), (AXIS,)) if batches and len(chosen) > 1 else None


def _of_each_process(count: int | None) -> list[Any]:
    chosen: list[Any] = []
    for process in range(jax.process_count()):
        own = [device for device in jax.devices() if device.process_index == process]
        if count is not None and len(own) < count:
            kind = own[0].platform.upper() if own else "no"
            advice = (
                "On the CPU more are simulated where jax_num_cpu_devices is set before JAX is "
                "used, as bilevel run --devices does."
                if kind == "CPU"
                else "Ask for as many as there are."
            )
            where = f" of process {process}" if several() else ""
            msg = f"optimize: devices={count}, and there are {len(own)} ({kind}){where}. {advice}"
            raise DevicesError(msg)
        chosen += own[:count]
    return chosen


class Placement:
    """Puts what a run computes with where it belongs.

    Parameters, optimizer and memory lie whole on every device, each batch's leading axis is
    split, and what XLA's partitioner makes of that sums gradients over the devices. What lies
    over several devices already stays as it is.

    - `mesh`: the devices; `None` leaves everything where it is.
    - `splits`: whether batches are split over them.

    **Arguments:**

    - `mesh`: from [`mesh_of`][].
    - `state`: parameters and memory, to see where the user has put them.

    **Raises:** `DevicesError` where that is on other devices.
    """

    def __init__(self, mesh: Mesh | None, state: PyTree):
        self.splits = mesh is not None
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if not _spread(leaf):
                continue
            if mesh is None:
                own = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
                mesh = own if isinstance(own, Mesh) else None
            elif leaf.sharding.device_set != set(mesh.devices.flat):
                msg = (
                    f"optimize: theta0 or memory, {jax.tree_util.keystr(path)}, lies on other "
                    f"devices ({len(leaf.sharding.device_set)}) than the batches shall "
                    f"({mesh.size}). Give devices= the mesh that it lies on."
                )
                raise DevicesError(msg)
        self.mesh = mesh

    @property
    def begun_with(self) -> dict[str, str]:
        """The devices in words, as a part of a run's fingerprint: sums depend on their order."""
        found = {"processes": str(jax.process_count())} if several() else {}
        if self.splits and self.mesh is not None:
            shape = " × ".join(map(str, self.mesh.devices.shape))
            found["devices"] = shape
        return found

    @property
    def _parts(self) -> int:
        assert self.mesh is not None
        return self.mesh.devices.shape[0]

    def whole(self, tree: PyTree) -> PyTree:
        """Every array of a tree on every device, unless it was put somewhere."""
        if self.mesh is None or not (self.splits or several()):
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: lay(leaf, sharding) if is_array(leaf) and not _spread(leaf) else leaf, tree
        )

    def batch(self, batch: PyTree) -> PyTree:
        """A batch, its leading axis split; arrays without one are everywhere.

        **Raises:** `DevicesError` where the devices do not divide it.
        """
        if self.mesh is None or not self.splits:
            return self.whole(batch)
        self.check(batch)
        axis = self.mesh.axis_names[0]
        split = NamedSharding(self.mesh, PartitionSpec(axis))
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def put(leaf: Any) -> Any:
            if not is_array(leaf) or _spread(leaf):
                return leaf
            return lay(leaf, split if np.ndim(leaf) else everywhere)

        return jax.tree.map(put, batch)

    def check(self, batch: PyTree) -> None:
        """Compare a batch with the devices.

        **Raises:** `ValueError` naming its size and theirs, where they do not divide it.
        """
        if self.mesh is None or not self.splits:
            return
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            size = np.shape(leaf)[0] if is_array(leaf) and np.ndim(leaf) else 0
            if size % self._parts and not _spread(leaf):
                where = jax.tree_util.keystr(path)
                msg = (
                    f"optimize: a batch of {size}{f' (at batch{where})' if where else ''} cannot "
                    f"be split evenly over {self._parts} devices. Take batches of a multiple of "
                    f"{self._parts}, such as {self._parts * -(-size // self._parts)}, or other "
                    "devices."
                )
                raise DevicesError(msg)

    def fidelity(self, fidelity: Fidelity) -> Fidelity:
        """Its numbers, as every process can hand them to a program of all."""
        if not several():
            return fidelity
        return jax.tree.map(
            lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, fidelity
        )

    def shardings(self, tree: PyTree) -> Any:
        """For each array of a tree where a program shall leave it; `None` if that is open."""
        if self.mesh is None:
            return None
        return jax.tree.map(lambda leaf: leaf.sharding if _spread(leaf) else None, tree)

    @property
    def everywhere(self) -> Any:
        """Where a program shall leave what the host reads; `None` if that is open."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())


def _spread(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def scattered(tree: PyTree) -> bool:
    """Whether there is such an array in a tree."""
    return any(is_scattered(leaf) for leaf in jax.tree.leaves(tree))
