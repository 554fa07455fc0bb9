"""What a computation is made of, and whether any of it is done by the host."""

import jax

CALLBACKS = {"pure_callback", "io_callback", "debug_callback", "debug_print", "outside_call"}


def primitives(jaxpr):
    """Names of all primitives, those of loops, branches and inner functions included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from primitives(value)


def _is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def callbacks(function, *arguments):
    """The callbacks to the host that a function makes, when it is traced for these arguments."""
    return CALLBACKS & set(primitives(jax.make_jaxpr(function)(*arguments)))
