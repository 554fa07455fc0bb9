"""Collectives: what a compiled program sends between devices, read from the program itself."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

Kind = Literal["collective-permute", "all-reduce", "all-gather", "all-to-all", "reduce-scatter"]

_BITS = {"pred": 8, "bf16": 16, "f8": 8, "c64": 64, "c128": 128}
_NAME = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s*(?:\([^\n]*)?\{\s*$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"\bwhile\(.*?body=%?([\w.\-]+)")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(get_args(Kind))})(?:-start)?\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[suf]\d+|c64|c128)\[([\d,]*)\]")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


class Collective(NamedTuple):
    """One operation of a program that sends between devices.

    **Arguments:**

    - `kind`: such as "collective-permute", which sends halos, or "all-reduce", which adds up.
    - `bytes`: of its result on one device.
    - `sent`: for a permutation the bytes that all devices together send.
    - `depth`: how many loops it stands in.

    >>> Collective("collective-permute", bytes=64, sent=448, depth=1).sent
    448
    """

    kind: str
    bytes: int
    sent: int
    depth: int


def collectives(function: Callable[..., Any], *arguments: Any) -> tuple[Collective, ...]:
    """The operations of a function's compiled program that send between devices.

    Each is told once; one within a loop is done as often as the loop goes round.

    **Arguments:**

    - `function`: of arrays, jitted or not.
    - `arguments`: arrays that lie as they will lie, or `jax.ShapeDtypeStruct` with a sharding.

    >>> import jax.numpy as jnp
    >>> collectives(lambda x: x + 1.0, jnp.ones(3))
    ()
    """
    lower: Any = getattr(function, "lower", None) or jax.jit(function).lower
    return read_collectives(lower(*arguments).compile().as_text())


def read_collectives(program: str) -> tuple[Collective, ...]:
    """Those of a program in the text of XLA's optimised HLO."""
    bodies = _computations(program)
    depths: dict[str, int] = {}
    entry = next((name for name in bodies if name.startswith("\0")), None)

    def visit(name: str, depth: int) -> None:
        if name not in bodies or depths.get(name, -1) >= depth:
            return
        depths[name] = depth
        for line in bodies[name]:
            loop = _LOOP.search(line)
            for called in _CALLED.findall(line):
                visit(called, depth + int(loop is not None))
            for group in _BRANCHES.findall(line):
                for called in group.split(","):
                    visit(called.strip().lstrip("%"), depth)

    if entry is not None:
        visit(entry, 0)
    found: list[Collective] = []
    for name, depth in depths.items():
        for line in bodies[name]:
            operation = _OPERATION.search(line)
            if operation is None:
                continue
            size = _size(operation[1], started="-start(" in line)
            found.append(Collective(operation[2], size, size * _senders(line), depth))
    return tuple(found)


def _computations(program: str) -> dict[str, list[str]]:
    """Lines by computation; the name of the first one to run begins with a NUL."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in program.splitlines():
        header = _NAME.match(line)
        if header is not None and not line.startswith(" "):
            name = ("\0" if line.startswith("ENTRY") else "") + header[1]
            current = found.setdefault(name, [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found


def _size(kind: str, *, started: bool) -> int:
    arrays = _ARRAY.findall(kind)
    if started and kind.startswith("("):
        # An operation that is started returns its operands, too, and then its results.
        arrays = arrays[len(arrays) // 2 :][: max(len(arrays) // 2, 1)]
    total = 0
    for dtype, shape in arrays:
        bits = next((b for name, b in _BITS.items() if dtype.startswith(name)), 0)
        bits = bits or int(re.sub(r"\D", "", dtype))
        total += bits // 8 * math.prod(int(n) for n in shape.split(",") if n)
    return total


def _senders(line: str) -> int:
    pairs = _PAIRS.search(line)
    return 0 if pairs is None else pairs[1].count("{")
