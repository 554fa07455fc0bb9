"""Block: operators between tuples of fields."""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel_pde.operator import Operator, is_factor
from bilevel_pde.scaled import Scaled
from bilevel_pde.sum import joined
from bilevel_pde.triangle import Part

Row = tuple[Operator | None, ...]


class Block(Operator):
    """A matrix of operators, from a tuple of fields to a tuple of fields.

    The fields may be tuples themselves, as a velocity is, and an operator a block one.

    **Arguments:**

    - `rows`: rows of operators, all of one length, with `None` for zero blocks. Each row and
        each column has an operator, which says what fields it is about.
    - `symmetric`, `positive_definite`: what is known of the whole. `None`: made out of the
        blocks; a block off the diagonal must be the transpose of its counterpart as built, and
        block-diagonal matrices of positive definite blocks are positive definite.

    **Raises:** `ValueError` for rows of different lengths, empty rows or columns, and blocks
    that do not fit the others in their row or column.

    >>> import jax.numpy as jnp
    >>> from bilevel_pde.grid import Grid
    >>> from bilevel_pde.laplace_operator import identity
    >>> one = identity(Grid(2))
    >>> saddle = Block([[2 * one, one], [one, None]])
    >>> top, bottom = saddle @ (jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0]))
    >>> top.tolist(), bottom.tolist()
    ([12.0, 24.0], [1.0, 2.0])
    >>> saddle.symmetric, saddle.positive_definite
    (True, False)
    """

    rows: tuple[Row, ...]
    declared_symmetric: bool | None = eqx.field(static=True)
    declared_positive_definite: bool | None = eqx.field(static=True)

    def __init__(
        self,
        rows: Sequence[Sequence[Operator | None]],
        *,
        symmetric: bool | None = None,
        positive_definite: bool | None = None,
    ):
        self.rows = tuple(tuple(row) for row in rows)
        self.declared_symmetric = True if positive_definite else symmetric
        self.declared_positive_definite = positive_definite
        _check(self.rows)

    @property
    def like(self) -> tuple[PyTree, ...]:
        """A field for each column."""
        return tuple(_first(column).like for column in zip(*self.rows, strict=True))

    @property
    def range_like(self) -> tuple[PyTree, ...]:
        """A field for each row."""
        return tuple(_first(row).range_like for row in self.rows)

    def matvec(self, v: PyTree) -> PyTree:
        """A v."""
        _check_fields(v, len(self.rows[0]))
        return tuple(_total(row, v, transpose=False) for row in self.rows)

    def rmatvec(self, v: PyTree) -> PyTree:
        """Aᵀ v."""
        _check_fields(v, len(self.rows))
        columns = zip(*self.rows, strict=True)
        return tuple(_total(column, v, transpose=True) for column in columns)

    def transposed(self) -> "Block":
        """Aᵀ."""
        if self.symmetric:
            return self
        columns = zip(*self.rows, strict=True)
        return Block([[_transposed(block) for block in column] for column in columns])

    def diagonal(self) -> PyTree | None:
        """A field for each block on the diagonal, zeros for `None`."""
        parts: list[PyTree] = []
        for i, like in enumerate(self.like):
            block = self.rows[i][i]
            part = _zeros(like) if block is None else block.diagonal()
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)

    def to_scipy(self) -> sp.csr_array:
        """The matrix, field after field."""
        blocks = [[None if b is None else b.to_scipy() for b in row] for row in self.rows]
        return sp.csr_array(sp.block_array(blocks))

    def entries(self) -> tuple[Any, Any, Array]:
        """Those of every block, moved to its place."""
        heights = [vector.size(like) for like in self.range_like]
        widths = [vector.size(like) for like in self.like]
        parts: list[tuple[Any, Any, Array]] = []
        for i, row in enumerate(self.rows):
            for j, block in enumerate(row):
                if block is not None:
                    rows, columns, values = block.entries()
                    above, before = sum(heights[:i]), sum(widths[:j])
                    parts.append((rows + above, columns + before, values))
        rows, columns = (joined([part[axis] for part in parts]) for axis in (0, 1))
        return rows, columns, jnp.concatenate([part[2] for part in parts])

    def triangle(self, part: Part, *, diagonal: bool) -> "Block":
        """Blocks of one side, and of those on the diagonal their triangles."""
        if self.like != self.range_like:
            msg = f"Block: {part} needs the same fields in rows and columns."
            raise ValueError(msg)
        rows: list[list[Operator | None]] = []
        for i, row in enumerate(self.rows):
            line: list[Operator | None] = []
            for j, block in enumerate(row):
                kept = j < i if part == "lower" else j > i
                if block is not None and i == j:
                    line.append(block.triangle(part, diagonal=diagonal))
                else:
                    # A zero block says what fields a row and a column are about.
                    line.append(block if kept or block is None else 0.0 * block)
            rows.append(line)
        return Block(rows)

    def boundary_term(self, values: Sequence[Any]) -> PyTree:
        """What boundary values add to A v.

        **Arguments:**

        - `values`: those of each field, as its operators take them, or `None`.
        """
        _check_fields(values, len(self.rows[0]))
        terms: list[PyTree] = []
        for row, like in zip(self.rows, self.range_like, strict=True):
            total = _zeros(like)
            for block, value in zip(row, values, strict=True):
                if block is not None and value is not None:
                    total = vector.add(total, _boundary_term(block, value))
            terms.append(total)
        return tuple(terms)

    def norm_bound(self) -> Float[Array, ""]:
        """A bound of ‖A‖₂, √(largest sum over rows times that over columns) of blocks' bounds."""
        bounds = [
            [jnp.zeros(()) if b is None else b.norm_bound() for b in row] for row in self.rows
        ]
        table = jnp.stack([jnp.stack(row) for row in bounds])
        return jnp.sqrt(jnp.max(table.sum(axis=0)) * jnp.max(table.sum(axis=1)))

    def __add__(self, other: Operator) -> Operator:
        """A + B, block by block where B is one with the same rows and columns."""
        if not isinstance(other, Block) or other.shape != self.shape:
            return super().__add__(other)
        if (other.like, other.range_like) != (self.like, self.range_like):
            return super().__add__(other)
        rows = [
            [a if b is None else b if a is None else a + b for a, b in zip(r, s, strict=True)]
            for r, s in zip(self.rows, other.rows, strict=True)
        ]
        symmetric = self.declared_symmetric and other.declared_symmetric
        definite = self.declared_positive_definite and other.declared_positive_definite
        return Block(rows, symmetric=symmetric or None, positive_definite=definite or None)

    def __mul__(self, factor: Array | float) -> Operator:
        """C A for a number c, block by block."""
        if not is_factor(self, factor):
            return NotImplemented
        rows = [[None if block is None else block * factor for block in row] for row in self.rows]
        definite = None
        if self.declared_positive_definite and not isinstance(factor, Tracer):
            definite = bool(float(factor) > 0)
        return Block(rows, symmetric=self.declared_symmetric, positive_definite=definite)

    @property
    def symmetric(self) -> bool | None:
        """Whether A = Aᵀ; `None` for unknown."""
        if self.declared_symmetric is not None:
            return self.declared_symmetric
        count = len(self.rows)
        if count != len(self.rows[0]):
            return False
        for i in range(count):
            block = self.rows[i][i]
            if block is not None and not block.symmetric:
                return block.symmetric
            for j in range(i):
                lower, upper = self.rows[i][j], self.rows[j][i]
                if not _same(_transposed(lower), upper):
                    return None
        return True

    @property
    def positive_definite(self) -> bool | None:
        """Whether A is symmetric positive definite; `None` for unknown."""
        if self.declared_positive_definite is not None:
            return self.declared_positive_definite
        on_diagonal = [row[i] for i, row in enumerate(self.rows) if i < len(row)]
        if self.symmetric is False or any(block is None for block in on_diagonal):
            return False
        known = [block.positive_definite for block in on_diagonal if block is not None]
        if False in known:
            return False
        apart = all(
            b is None for i, row in enumerate(self.rows) for j, b in enumerate(row) if i != j
        )
        return True if apart and all(known) else None


def block_diagonal(*operators: Operator) -> Block:
    """Operators that act on one field each, side by side.

    >>> from bilevel_pde.grid import Grid
    >>> from bilevel_pde.laplace_operator import identity
    >>> block_diagonal(identity(Grid(2)), identity(Grid(3))).shape
    (5, 5)
    """
    count = len(operators)
    return Block([[operators[i] if i == j else None for j in range(count)] for i in range(count)])


def _check(rows: tuple[Row, ...]) -> None:
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        msg = f"Block: rows should be of one length, got {[len(row) for row in rows]}."
        raise ValueError(msg)
    for i, row in enumerate(rows):
        for j, block in enumerate(row):
            if block is not None and not isinstance(block, Operator):
                msg = f"Block: block {i, j} should be an operator or None, got {block!r}."
                raise TypeError(msg)
    for what, lines in (("row", rows), ("column", tuple(zip(*rows, strict=True)))):
        for index, line in enumerate(lines):
            there = [block for block in line if block is not None]
            if not there:
                msg = (
                    f"Block: {what} {index} has no operator, so its field is not known. Use "
                    "0.0 * identity(grid) for one of them."
                )
                raise ValueError(msg)
            kinds = [_kind(b.range_like if what == "row" else b.like) for b in there]
            if any(kind != kinds[0] for kind in kinds):
                msg = f"Block: operators in {what} {index} are about different fields: {kinds}."
                raise ValueError(msg)


def _check_fields(v: Any, count: int) -> None:
    if not isinstance(v, tuple | list) or len(v) != count:
        found = f"a tuple of {len(v)}" if isinstance(v, tuple | list) else type(v).__name__
        msg = f"Block: it acts on a tuple of {count} fields, got {found}."
        raise ValueError(msg)


def _total(line: Row, v: PyTree, *, transpose: bool) -> PyTree:
    terms = [
        block.rmatvec(part) if transpose else block.matvec(part)
        for block, part in zip(line, v, strict=True)
        if block is not None
    ]
    return functools.reduce(vector.add, terms)


def _first(line: Row) -> Operator:
    return next(block for block in line if block is not None)


def _transposed(block: Operator | None) -> Operator | None:
    return None if block is None else block.transposed()


def _zeros(like: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def _kind(like: PyTree) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(like)
    return (structure, *((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves))


def _same(a: Operator | None, b: Operator | None) -> bool:
    """Whether two operators are one by how they are built."""
    (left, a), (right, b) = _split(a), _split(b)
    if len(left) != len(right) or not all(map(_same_leaf, left, right)):
        return False
    first, second = jax.tree.leaves(a), jax.tree.leaves(b)
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(_same_leaf(x, y) for x, y in zip(first, second, strict=True))


def _split(operator: Operator | None) -> tuple[list[Any], Operator | None]:
    """The factors in front of an operator, known ones multiplied, and the operator."""
    known, others = 1.0, []
    while isinstance(operator, Scaled):
        if isinstance(operator.factor, jax.Array):
            others.append(operator.factor)
        else:
            known *= float(operator.factor)
        operator = operator.operator
    return [known, *others], operator


def _same_leaf(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, jax.Array) or isinstance(y, jax.Array):
        return False
    return bool(np.array_equal(x, y))


def _boundary_term(block: Operator, values: Any) -> PyTree:
    term: Any = getattr(block, "boundary_term", None)
    if term is None:
        msg = (
            f"Block: {type(block).__name__} takes no boundary values; add the boundary_term of "
            "the operators it is made of."
        )
        raise ValueError(msg)
    return term(values)
