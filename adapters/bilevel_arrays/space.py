"""Space: pytrees of somebody else's arrays as elements of a real vector space."""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bilevel_arrays.library import load

compat: Any = load("array_api_compat")

_WIDEST = {"float16": 0, "bfloat16": 0, "float32": 32, "float64": 64}


class Space:
    """The vector space that the unknown is in: one array library, one device, one dtype.

    Numbers such as norms are Python's: each one is waited for, as eager loops must.

    **Arguments:**

    - `x`: the start, a pytree of real floating-point arrays.

    **Raises:** `TypeError` for arrays of JAX, of two libraries, devices or dtypes, and for what is
    no real floating-point array.

    >>> import numpy as np
    >>> space = Space({"a": np.ones(3), "b": np.zeros((2, 2))})
    >>> space.norm({"a": np.full(3, 2.0), "b": np.ones((2, 2))})
    4.0
    """

    def __init__(self, x: PyTree):
        paths = jax.tree_util.tree_leaves_with_path(x)
        if not paths:
            msg = f"x0 must hold at least one array, got an empty pytree {x!r}."
            raise TypeError(msg)
        first: Any = None
        for path, leaf in paths:
            where = f"x0{jax.tree_util.keystr(path)}"
            if isinstance(leaf, jax.Array):
                msg = f"{where} is an array of JAX. Use bl.solve and the problems of bilevel."
                raise TypeError(msg)
            if not compat.is_array_api_obj(leaf):
                msg = (
                    f"{where} must be an array of PyTorch, CuPy, NumPy or another library that "
                    f"follows the array API, got {type(leaf).__name__}."
                )
                raise TypeError(msg)
            kind = compat.array_namespace(leaf), compat.device(leaf), leaf.dtype
            if not kind[0].isdtype(leaf.dtype, "real floating") or not self._bits(leaf.dtype):
                msg = (
                    f"{where} must be of float32 or float64, got {leaf.dtype}. Complex unknowns "
                    "are for bl.solve, and half precision holds no tolerance."
                )
                raise TypeError(msg)
            if first is None:
                first = where, kind
            for this, other, what in zip(
                kind, first[1], ("library", "device", "dtype"), strict=True
            ):
                if this != other:
                    names = [getattr(part, "__name__", part) for part in (other, this)]
                    msg = (
                        f"x0 is of two kinds: the {what} of {first[0]} is {names[0]} and that of "
                        f"{where} {names[1]}. Convert one of them."
                    )
                    raise TypeError(msg)
        self.xp, self.device, self.dtype = first[1]
        self.like = x
        self.epsilon = float(self.xp.finfo(self.dtype).eps)
        self.narrow = self._bits(self.dtype) < 64
        self.is_torch = bool(compat.is_torch_array(paths[0][1]))

    @staticmethod
    def _bits(dtype: Any) -> int:
        return _WIDEST.get(str(dtype).rpartition(".")[2], 64)

    def array(self, values: Any) -> Any:
        """Numbers of NumPy as an array of this space's library, device and dtype."""
        wide = np.ascontiguousarray(values, np.float64)
        return self.xp.asarray(wide, dtype=self.dtype, device=self.device)

    def host(self, array: Any) -> np.ndarray:
        """A small array as one of NumPy, in double precision."""
        if compat.is_torch_array(array):
            array = array.detach().cpu().numpy()
        elif compat.is_cupy_array(array):
            array = array.get()
        elif not isinstance(array, np.ndarray):
            array = np.from_dlpack(array)
        return np.asarray(array, np.float64)

    def add(self, x: PyTree, y: PyTree) -> PyTree:
        """x + y."""
        return jax.tree.map(lambda a, b: a + b, x, y)

    def subtract(self, x: PyTree, y: PyTree) -> PyTree:
        """x - y."""
        return jax.tree.map(lambda a, b: a - b, x, y)

    def negative(self, x: PyTree) -> PyTree:
        """-x."""
        return jax.tree.map(lambda a: -a, x)

    def scale(self, factor: float, x: PyTree) -> PyTree:
        """factor * x."""
        return jax.tree.map(lambda a: float(factor) * a, x)

    def add_scaled(self, x: PyTree, factor: float, y: PyTree) -> PyTree:
        """x + factor * y."""
        return jax.tree.map(lambda a, b: a + float(factor) * b, x, y)

    def zeros(self) -> PyTree:
        """The zero vector."""
        return jax.tree.map(self.xp.zeros_like, self.like)

    def dot(self, x: PyTree, y: PyTree) -> float:
        """⟨x, y⟩."""
        xp = self.xp
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        terms = (xp.reshape(a, (-1,)) @ xp.reshape(b, (-1,)) for a, b in pairs)
        return float(sum(float(term) for term in terms))

    def norm(self, x: PyTree) -> float:
        """Euclidean norm over all leaves."""
        return root(self.dot(x, x))

    def robust_norm(self, x: PyTree) -> float:
        """Euclidean norm, right for every number that single precision can hold."""
        if not self.narrow:
            return self.norm(x)
        sizes = (self.xp.max(self.xp.abs(leaf)) for leaf in jax.tree.leaves(x) if size(leaf))
        one = self.unit(max((float(value) for value in sizes), default=0.0))
        return one * self.norm(self.scale(1.0 / one, x))

    def unit(self, size: float) -> float:
        """The power of two just below a size; 1 in double precision, for zero and NaN."""
        if not self.narrow or not (0 < size < math.inf):
            return 1.0
        tiny = float(self.xp.finfo(self.dtype).smallest_normal)
        return min(max(2.0 ** (math.frexp(size)[1] - 1), 4 * tiny), 0.25 / tiny)

    def arbitrary(self, seed: int) -> PyTree:
        """Numbers between -1 and 1 without a pattern, those of `bilevel.vector.arbitrary`."""
        leaves, treedef = jax.tree.flatten(self.like)
        found: list[Any] = []
        for place, leaf in enumerate(leaves):
            hashed = np.arange(size(leaf), dtype=np.uint32) * np.uint32(2654435761)
            hashed = hashed + np.uint32((16 * place + 4 * seed) * 0x9E3779B9 & 0xFFFFFFFF)
            hashed = (hashed ^ (hashed >> np.uint32(15))) * np.uint32(2246822519)
            hashed = (hashed ^ (hashed >> np.uint32(13))) * np.uint32(3266489917)
            numbers = (hashed >> np.uint32(8)) / 2.0**23 - 1.0
            found.append(self.xp.reshape(self.array(numbers), tuple(leaf.shape)))
        return jax.tree.unflatten(treedef, found)

    def size(self) -> int:
        """How many unknowns there are."""
        return sum(size(leaf) for leaf in jax.tree.leaves(self.like))

    def require_like(self, what: str, outcome: PyTree) -> PyTree:
        """The outcome, where it is like the unknown.

        **Raises:** `TypeError` naming the leaf that is not.
        """
        expected, got = jax.tree.structure(self.like), jax.tree.structure(outcome)
        if expected != got:
            msg = f"{what} must have the structure of x0, {expected}, got {got}."
            raise TypeError(msg)
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(self.like), jax.tree.leaves(outcome), strict=True
        )
        for (path, leaf), value in pairs:
            kinds = [
                (
                    str(getattr(part, "dtype", type(part).__name__)),
                    tuple(getattr(part, "shape", ())),
                )
                for part in (leaf, value)
            ]
            if kinds[0] != kinds[1]:
                names = [f"{dtype}{list(shape)}" for dtype, shape in kinds]
                msg = (
                    f"{what} at x{jax.tree_util.keystr(path)} is {names[1]}, expected {names[0]} "
                    "as x0 has. Give x0, theta and the data one dtype, and check the shapes."
                )
                raise TypeError(msg)
            if compat.is_array_api_obj(value) and compat.device(value) != self.device:
                msg = (
                    f"{what} at x{jax.tree_util.keystr(path)} is on {compat.device(value)}, and x0 "
                    f"on {self.device}. Have all data of the problem on one device."
                )
                raise TypeError(msg)
        return outcome


class Rows:
    """So many vectors of a space, stored as rows.

    **Arguments:**

    - `space`: theirs. `count`: how many; zero at first.
    """

    def __init__(self, space: Space, count: int):
        self._space = space
        self._leaves = [
            space.xp.zeros((count, size(leaf)), dtype=space.dtype, device=space.device)
            for leaf in jax.tree.leaves(space.like)
        ]

    def write(self, index: int, v: PyTree) -> None:
        """Replace one vector."""
        for rows, leaf in zip(self._leaves, jax.tree.leaves(v), strict=True):
            rows[index, :] = self._space.xp.reshape(leaf, (-1,))

    def read(self, index: int) -> PyTree:
        """One vector."""
        return self._shaped([rows[index, :] for rows in self._leaves])

    def project(self, v: PyTree) -> np.ndarray:
        """The inner products with every row, on the host."""
        xp = self._space.xp
        products = [
            self._space.host(rows @ xp.reshape(leaf, (-1,)))
            for rows, leaf in zip(self._leaves, jax.tree.leaves(v), strict=True)
        ]
        return np.sum(products, axis=0)

    def combine(self, coefficients: np.ndarray) -> PyTree:
        """The linear combination of the first rows, as many as there are coefficients."""
        weights = self._space.array(coefficients)
        return self._shaped([weights @ rows[: len(coefficients), :] for rows in self._leaves])

    def _shaped(self, flat: list[Any]) -> PyTree:
        leaves, treedef = jax.tree.flatten(self._space.like)
        shaped = [
            self._space.xp.reshape(part, tuple(leaf.shape))
            for part, leaf in zip(flat, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, shaped)


def size(array: Any) -> int:
    """How many entries an array has."""
    return math.prod(array.shape)


def root(number: float) -> float:
    """The square root; NaN of a negative number, as arrays have it."""
    return math.sqrt(number) if not number < 0 else math.nan


def quotient(number: float, divisor: float) -> float:
    """The quotient, as arrays have it: infinite or NaN where the divisor is zero."""
    if divisor == 0:
        return math.nan if number == 0 or math.isnan(number) else math.copysign(math.inf, number)
    return number / divisor
