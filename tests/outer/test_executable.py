"""Executables: what compiles, and that it is counted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.outer.executable import Executable


def test_values_do_not_compile_and_types_do():
    traced: list[int] = []

    def double(x: jax.Array) -> jax.Array:
        traced.append(1)
        return 2 * x

    executable = Executable(double)
    inputs: list[Any] = [jnp.ones(2), 3 * jnp.ones(2), np.ones(2)]
    for x in inputs:
        np.testing.assert_array_equal(executable(x), 2 * np.asarray(x))
    assert executable.count == len(traced) == 1
    executable(jnp.ones(3))
    executable(jnp.ones(3, jnp.float32))
    assert executable.count == len(traced) == 3
    assert executable.seconds > 0


def test_prepared_by_shape_it_does_not_compile_again():
    executable = Executable(lambda x: x + 1)
    out = executable.prepare(jax.ShapeDtypeStruct((2,), jnp.float64))
    assert out.shape == (2,)
    assert executable(jnp.zeros(2)).tolist() == [1, 1]
    assert executable.count == 1


def test_a_sharding_that_was_asked_for_is_kept_apart():
    executable = Executable(lambda x: x + 1)
    executable(jnp.zeros(2))
    executable(jax.device_put(jnp.zeros(2), jax.devices()[0]))
    assert executable.count == 2


def test_errors_while_tracing_come_out():
    def wrong(x: jax.Array) -> jax.Array:
        msg = "mine"
        raise KeyError(msg)

    executable = Executable(wrong)
    with pytest.raises(KeyError, match="mine"):
        executable(jnp.zeros(2))
    assert executable.count == 0


def test_errors_while_compiling_come_out():
    def callback_on_unknown(x: jax.Array) -> jax.Array:
        return jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(Exception, match="no_such_target"):
        Executable(callback_on_unknown)(jnp.zeros(2))
