"""Meshes of devices, and arrays that lie on them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel_arrays.mesh.layout import check_mesh


def device_mesh(
    shape: int | Sequence[int] | None = None,
    names: str | Sequence[str] | None = None,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of devices whose axes are left to the compiler, as solvers want them.

    **Arguments:**

    - `shape`: devices along each axis of the mesh; all of them along one by default. The order is
        that of `jax.make_mesh`: neighbours in the mesh are near each other where that is known.
    - `names`: of the axes; "devices" for one, "x", "y", "z" for up to three.
    - `devices`: those to take, `jax.devices()` by default: in several processes those of all.

    **Raises:** `ValueError` for a shape of another number of devices than there are, and for names
    that are not one for each axis.

    >>> dict(device_mesh(devices=jax.devices()[:1]).shape)
    {'devices': 1}
    """
    given = list(jax.devices() if devices is None else devices)
    sizes = (len(given),) if shape is None else tuple(np.atleast_1d(shape).tolist())
    if any(size < 1 for size in sizes) or int(np.prod(sizes)) != len(given):
        msg = (
            f"device_mesh: shape should have a product of {len(given)}, the number of devices, got "
            f"{shape!r}. Give another shape or devices=; on a CPU "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of them."
        )
        raise ValueError(msg)
    if names is None:
        names = ("devices",) if len(sizes) == 1 else ("x", "y", "z")[: len(sizes)]
    labels = (names,) if isinstance(names, str) else tuple(names)
    if len(labels) != len(sizes) or len(set(labels)) != len(labels):
        msg = (
            f"device_mesh: names should be {len(sizes)} different ones, one for each axis of the "
            f"shape {sizes}, got {names!r}."
        )
        raise ValueError(msg)
    return jax.make_mesh(sizes, labels, axis_types=(AxisType.Auto,) * len(sizes), devices=given)


def place(array: Any, mesh: Mesh, axes: str | Sequence[str | None] | None = None) -> jax.Array:
    """An array cut into blocks over a mesh of devices.

    **Arguments:**

    - `array`: of NumPy or JAX; in several processes the same whole array in each, of which every
        process keeps what its devices hold.
    - `axes`: for each axis of the array the mesh axis that it is cut along, or `None`; one name
        for the first axis; by default the array lies whole on every device.

    **Raises:** `ValueError` for a mesh axis that there is not, and one that does not divide the
    array.

    >>> place(np.ones((4, 6)), device_mesh(), "devices").shape
    (4, 6)
    """
    check_mesh("place", mesh)
    given: tuple[Any, ...] = (axes,) if isinstance(axes, str) else tuple(axes or ())
    shape = np.shape(array)
    for axis, name in enumerate(given):
        if name is None:
            continue
        if name not in mesh.axis_names:
            msg = f"place: axes should name axes of the mesh, {mesh.axis_names}, got {name!r}."
            raise ValueError(msg)
        if axis >= len(shape) or shape[axis] % mesh.shape[name]:
            msg = (
                f"place: the {mesh.shape[name]} devices of mesh axis {name!r} should divide axis "
                f"{axis} of the array without rest, got shape {shape}. Cut another axis, or take "
                "another number of devices or points."
            )
            raise ValueError(msg)
    sharding = NamedSharding(mesh, PartitionSpec(*given))
    if jax.process_count() == 1 or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def gather(array: jax.Array) -> np.ndarray:
    """The whole of an array that lies over several devices, as NumPy's on every process.

    **Arguments:**

    - `array`: of JAX; in several processes all of them have to call this.

    >>> gather(place(np.arange(4.0), device_mesh(), "devices")).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils  # noqa: PLC0415

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
