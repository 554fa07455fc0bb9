"""Sharding: how an array lies over several devices, in a manifest and back."""

from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic import Field

from bilevel.outer.checkpoints.durable import DamagedError
from bilevel.outer.checkpoints.part import Part, Size
from bilevel.outer.fingerprint import OtherRunError

_Axis = Annotated[str, Field(min_length=1, max_length=64)]


class ShardingEntry(Part):
    """Of one array that lies over several devices.

    - `axes`: names of the mesh's axes.
    - `mesh`: how many devices there are along each.
    - `devices`: their numbers, in the mesh's order.
    - `spec`: for each dimension of the array the axes it is cut along.
    """

    axes: tuple[_Axis, ...]
    mesh: tuple[Size, ...]
    devices: Annotated[tuple[Size, ...], Field(max_length=2**16)]
    spec: tuple[tuple[_Axis, ...] | None, ...]

    @classmethod
    def of(cls, leaf: Any) -> "ShardingEntry | None":
        """Of an array; `None` for what is on one device, or not laid out along a mesh."""
        sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if not isinstance(sharding, NamedSharding) or not isinstance(mesh, Mesh) or mesh.size < 2:
            return None
        devices: Any = mesh.devices
        return cls(
            axes=tuple(map(str, mesh.axis_names)),
            mesh=tuple(devices.shape),
            devices=tuple(device.id for device in devices.flat),
            spec=tuple(
                part if part is None else ((part,) if isinstance(part, str) else tuple(part))
                for part in sharding.spec
            ),
        )

    def sharding(self, name: str) -> NamedSharding:
        """On the devices that are there.

        **Raises:** [`OtherRunError`][] where they are not, naming the array; [`DamagedError`][]
        where there is no such sharding.
        """
        there = {device.id: device for device in jax.devices()}
        if not set(self.devices) <= set(there):
            msg = f"{name} lay over {len(self.devices)} devices, and there are {len(there)}"
            raise OtherRunError(msg)
        # Filled one by one: NumPy would look into devices for their parts.
        devices = np.empty(len(self.devices), dtype=object)
        for place, number in enumerate(self.devices):
            devices[place] = there[number]
        try:
            mesh = Mesh(devices.reshape(self.mesh), self.axes)
            return NamedSharding(mesh, PartitionSpec(*self.spec))
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{name} cannot lie as its manifest says: {error}"
            raise DamagedError(msg) from None
