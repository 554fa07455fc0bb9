"""Networks that the examples share: a fully connected one and a residual convolution network.

Both take one field and return one; `jax.vmap` makes them take batches.  Task files run by
`bilevel run` or by Python have their folder on the path, so `from networks import FieldMLP` works.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class FieldMLP(eqx.Module):
    """A multilayer perceptron on the flattened field, with ReLU between its layers.

    Weights and biases start uniform in ±1/√n, n the inputs of a layer, as in Equinox.

    **Arguments:**

    - `key`: of the random weights.
    - `shape`: of the fields, (n,), (n, m) or (n, m, l).
    - `width`: of the hidden layers.
    - `depth`: how many hidden layers.
    - `dtype`: of the parameters; JAX's default by default.

    >>> net = FieldMLP(jax.random.key(0), (30,))
    >>> net(jnp.zeros(30)).shape
    (30,)
    """

    layers: tuple[eqx.nn.Linear, ...]

    def __init__(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, ...],
        width: int = 64,
        depth: int = 3,
        *,
        dtype: jnp.dtype | None = None,
    ):
        size = 1
        for points in shape:
            size *= points
        sizes = [size, *[width] * depth, size]
        keys = jax.random.split(key, depth + 1)
        self.layers = tuple(
            eqx.nn.Linear(before, after, dtype=dtype, key=one)
            for before, after, one in zip(sizes[:-1], sizes[1:], keys, strict=True)
        )

    def __call__(self, field: Float[Array, "..."]) -> Float[Array, "..."]:
        """A field of the same shape."""
        *hidden, last = self.layers
        state = jnp.ravel(field)
        for layer in hidden:
            state = jax.nn.relu(layer(state))
        return last(state).reshape(field.shape)


class ResidualBlock(eqx.Module):
    """h + conv(relu(conv(relu(h)))): the activation comes first, so that h itself is passed on."""

    first: eqx.nn.Conv
    second: eqx.nn.Conv

    def __call__(self, h: Float[Array, "channels ..."]) -> Float[Array, "channels ..."]:
        """Features of the same shape."""
        return h + self.second(jax.nn.relu(self.first(jax.nn.relu(h))))


class ResidualConvolution(eqx.Module):
    """A residual convolution network: a lift, residual blocks, a projection.

    lift: one convolution to `channels` features.  Each block: h + conv(relu(conv(relu(h)))).
    Projection: relu, then one pointwise convolution to the outputs.  Resolution is kept, so
    the network works on fields of any size; with periodic padding it commutes with shifts.

    Weights and biases start uniform in ±1/√n, n the inputs of a convolution, as in Equinox: each
    block then starts with a branch much smaller than the features that it passes on, and no
    normalisation is needed.

    **Arguments:**

    - `key`: of the random weights.
    - `dimensions`: of space, 1, 2 or 3.
    - `inputs`, `outputs`: components of the fields.
    - `channels`: features inside.
    - `blocks`: how many residual blocks.
    - `periodic`: pad with the other side of the field; else with zeros.
    - `kernel`: points a side of each convolution's window, odd.
    - `final_scale`: factor on the first weights and biases of the projection.  A corrector of a
        simulation starts better near zero, say with 0.01: the trained rollout is then first the
        simulation itself, and not thrown off by noise that the next step amplifies.  Zero would
        leave all layers before the projection without a gradient in the first update.
    - `dtype`: of the parameters; JAX's default by default.

    >>> net = ResidualConvolution(jax.random.key(0), 2, inputs=2, outputs=2, channels=8)
    >>> net(jnp.zeros((2, 16, 16))).shape
    (2, 16, 16)
    """

    lift: eqx.nn.Conv
    blocks: tuple[ResidualBlock, ...]
    projection: eqx.nn.Conv

    def __init__(
        self,
        key: PRNGKeyArray,
        dimensions: int,
        inputs: int,
        outputs: int,
        channels: int = 64,
        blocks: int = 3,
        periodic: bool = True,  # noqa: FBT001, FBT002
        kernel: int = 3,
        *,
        final_scale: float = 1.0,
        dtype: jnp.dtype | None = None,
    ):
        if kernel % 2 == 0:
            msg = f"kernel is odd, so that fields keep their shape; got {kernel}."
            raise ValueError(msg)
        keys = iter(jax.random.split(key, 2 * blocks + 2))

        def convolution(before: int, after: int, window: int) -> eqx.nn.Conv:
            return eqx.nn.Conv(
                dimensions,
                before,
                after,
                window,
                padding=window // 2,
                padding_mode="CIRCULAR" if periodic else "ZEROS",
                dtype=dtype,
                key=next(keys),
            )

        self.lift = convolution(inputs, channels, kernel)
        self.blocks = tuple(
            ResidualBlock(
                convolution(channels, channels, kernel), convolution(channels, channels, kernel)
            )
            for _ in range(blocks)
        )
        projection = convolution(channels, outputs, 1)
        self.projection = jax.tree.map(lambda leaf: final_scale * leaf, projection)

    def __call__(self, field: Float[Array, "inputs ..."]) -> Float[Array, "outputs ..."]:
        """A field of the same resolution."""
        h = self.lift(field)
        for block in self.blocks:
            h = block(h)
        return self.projection(jax.nn.relu(h))
