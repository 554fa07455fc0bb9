"""A model of what an iteration on a grid cut over many devices takes: work, halos, sums."""

from typing import NamedTuple


class Machine(NamedTuple):
    """What a device and the ways between devices take.

    **Arguments:**

    - `copy`: seconds a byte is read and written again, on one device.
    - `launch`: seconds that a device takes for a kernel of no size.
    - `message`: seconds a message between two devices takes at least.
    - `byte`: seconds a byte more of a message takes.
    - `reduction`: seconds a sum over all devices takes.
    - `workers`: devices that can work at the same time: all of them, or as many as there are cores.
    """

    copy: float
    launch: float
    message: float
    byte: float
    reduction: float
    workers: int | None = None


class Work(NamedTuple):
    """What an iteration does.

    **Arguments:**

    - `copied`: bytes read and written again by all devices together.
    - `launches`: kernels of each device.
    - `messages`: messages of a device.
    - `sent`: bytes sent by a device.
    - `reductions`: sums over all devices.
    """

    copied: float
    launches: float
    messages: float
    sent: float
    reductions: float


class Parts(NamedTuple):
    """Seconds of an iteration."""

    compute: float
    launches: float
    halo: float
    reductions: float

    @property
    def total(self) -> float:
        """All of it, one after another."""
        return sum(self)


def predict(machine: Machine, work: Work, devices: int) -> Parts:
    """What an iteration takes on so many devices, nothing of it at the same time.

    Devices that share cores wait for one another in everything they do.
    """
    workers = devices if machine.workers is None else min(devices, machine.workers)
    shared = devices / workers
    return Parts(
        machine.copy * work.copied / workers,
        shared * machine.launch * work.launches,
        shared * (machine.message * work.messages + machine.byte * work.sent),
        machine.reduction * work.reductions,
    )


def halo_of_cube(points: int, blocks: tuple[int, int, int], item: int) -> tuple[int, int]:
    """Messages and bytes of the busiest block of points³, for a stencil that reaches one point."""
    sides = [points // count for count in blocks]
    messages = sent = 0
    for axis, count in enumerate(blocks):
        neighbours = min(count - 1, 2)
        surface = sides[0] * sides[1] * sides[2] // sides[axis]
        messages += neighbours
        sent += neighbours * surface * item
    return messages, sent


def levels_of_cube(points: int, gather_below: int) -> tuple[list[int], list[int]]:
    """Points along an axis of the cut levels of a multigrid cycle, and of the gathered ones."""
    cut: list[int] = []
    whole: list[int] = []
    while points >= 8:
        (cut if points**3 > gather_below else whole).append(points)
        points //= 2
    return cut, [*whole, points]
