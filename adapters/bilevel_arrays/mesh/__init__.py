"""Operators on grids over many devices: blocks, halos, and sums over all of them."""

from bilevel_arrays.mesh.collectives import Collective, collectives
from bilevel_arrays.mesh.device_mesh import device_mesh, gather, place
from bilevel_arrays.mesh.partitioned import Partitioned, partition
from bilevel_arrays.mesh.traffic import HaloTraffic, halo_traffic

__all__ = [
    "Collective",
    "HaloTraffic",
    "Partitioned",
    "collectives",
    "device_mesh",
    "gather",
    "halo_traffic",
    "partition",
    "place",
]
