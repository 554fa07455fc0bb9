"""What tensors and functions of torch are refused, in words: else numbers would be wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_arrays as ba

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch==2.13.0")

DOUBLE = {"dtype": torch.float64}
START, ONE = torch.zeros(3, **DOUBLE), torch.ones(3, **DOUBLE)
ELSEWHERE = torch.ones(3, device="meta", **DOUBLE)
"""On a device that needs no hardware; as a tensor on a GPU is to one on the CPU."""


def learned():
    return torch.ones(3, requires_grad=True, **DOUBLE)


def mean_of(operation, **arguments):
    """A contraction with an operation in it whose result counts for nothing."""
    return lambda x, theta: (operation(x, **arguments), 0.5 * x + theta)[1]


LEARNED, BUFFER = learned(), torch.zeros((), **DOUBLE)
OUTSIDE = "writes into a tensor from outside"
READS = "reads a number out of a tensor"
WRITES = "writes into its argument"
RANDOM = "draws random numbers"

FUNCTIONS = {
    "item": (mean_of(lambda x: x.sum().item()), TypeError, READS),
    "tolist": (mean_of(lambda x: x.tolist()), TypeError, READS),
    "if": (mean_of(lambda x: 1 if x.sum() > 0 else 0), TypeError, READS),
    "int": (mean_of(lambda x: int(x[0])), TypeError, READS),
    "in place": (mean_of(lambda x: x.add_(1)), ValueError, WRITES),
    "a view in place": (mean_of(lambda x: x.view(-1)[0].mul_(2)), ValueError, WRITES),
    "data in place": (mean_of(lambda x: x.data.add_(1)), ValueError, WRITES),
    "numpy in place": (mean_of(lambda x: np.add(x.numpy(), 1, out=x.numpy())), ValueError, WRITES),
    "out=": (mean_of(lambda x: torch.mul(x, 2, out=x)), ValueError, WRITES),
    "a list in place": (mean_of(lambda x: torch._foreach_add_([x], 1)), ValueError, WRITES),
    "a buffer": (mean_of(lambda x: BUFFER.add_(1)), ValueError, OUTSIDE),
    "a buffer by index": (mean_of(lambda x: BUFFER.view(1).__setitem__(0, 2)), ValueError, OUTSIDE),
    "rand": (mean_of(torch.rand_like), TypeError, RANDOM),
    "dropout": (mean_of(torch.nn.functional.dropout), TypeError, RANDOM),
    "normal": (mean_of(lambda x: torch.empty_like(x).normal_()), TypeError, RANDOM),
    "moves": (mean_of(lambda x: x.to("meta")), TypeError, "moves a tensor from cpu to meta"),
    "captured elsewhere": (lambda x, t: 0.5 * x + ELSEWHERE, TypeError, "on two devices"),
    "returned elsewhere": (lambda x, t: ELSEWHERE, TypeError, "is on meta, and x0 on cpu"),
    "single": (lambda x, t: (0.5 * x).float(), TypeError, r"float32\[3\], expected torch.float64"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_no_solver_can_live_with_are_refused(name):
    function, error, message = FUNCTIONS[name]
    with pytest.raises(error, match=rf"FixedPoint.*{message}"):
        ba.solve(ba.FixedPoint(function), ONE, START)


def in_its_own(x, theta):
    """Writes, but into nothing that was there before."""
    own = torch.empty_like(x)
    torch.mul(x, 0.5, out=own)
    own += theta
    own[0] = own[0] + 0
    parts = own.clone().view(3, 1)
    parts.mul_(1)
    return own


HARMLESS = {
    "own memory": in_its_own,
    "a seeded generator": mean_of(
        lambda x: torch.rand(3, generator=torch.Generator().manual_seed(0))
    ),
    "printing": mean_of(str),
    "other dtypes": mean_of(lambda x: x.float().bfloat16().long()),
    "masks": lambda x, theta: torch.where(x > 9, x, 0.5 * x + theta),
    "detached": mean_of(lambda x: x.detach().numpy().sum()),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_functions_that_do_no_harm_are_not(name):
    solution = ba.solve(ba.FixedPoint(HARMLESS[name]), ONE, START)
    torch.testing.assert_close(solution.value, 2 * ONE)


def test_modules_in_training_mode_are_refused_where_that_matters():
    for layer in (torch.nn.BatchNorm1d(3, **DOUBLE), torch.nn.Dropout(0.5)):

        def mapping(x, theta, layer=layer):
            return 0.1 * layer(x) + theta

        x, theta = torch.zeros(4, 3, **DOUBLE), torch.ones(4, 3, **DOUBLE)
        with torch.no_grad():
            with pytest.raises((TypeError, ValueError), match=r"\.eval\(\)"):
                ba.solve(ba.FixedPoint(mapping), theta, x)
            layer.eval()
            assert ba.solve(ba.FixedPoint(mapping), theta, x).diagnosis.startswith("CONVERGED")


def system(rhs=lambda theta: theta, matrix=None, **given):
    matrix = torch.eye(3, **DOUBLE) if matrix is None else matrix
    return lambda: ba.solve(ba.LinearSystem(matrix, rhs), ONE, START, **given)


def loss(function):
    contraction = ba.FixedPoint(lambda x, theta: 0.5 * x + theta)
    return lambda: ba.hypergradient(function, contraction, ONE, START)


ARGUMENTS = {
    "right-hand side elsewhere": (
        system(lambda theta: ELSEWHERE),
        TypeError,
        r"LinearSystem: rhs\(theta\) at x is on meta, and x0 on cpu",
    ),
    "right-hand side in single": (
        system(torch.ones(3)),
        TypeError,
        r"torch.float32\[3\], expected torch.float64\[3\]",
    ),
    "matrix of NumPy": (
        system(matrix=np.eye(3)),
        TypeError,
        "the matrix is a numpy.ndarray and the unknown of array_api_compat.torch",
    ),
    "matrix in single": (
        system(matrix=torch.eye(3)),
        TypeError,
        "the matrix is of torch.float32 and the unknown of torch.float64",
    ),
    "sparse in single": (
        system(matrix=torch.eye(3).to_sparse()),
        TypeError,
        "the matrix is of torch.float32",
    ),
    "learned matrix": (
        system(matrix=torch.eye(3, requires_grad=True, **DOUBLE)),
        ValueError,
        "captured a tensor that requires grad",
    ),
    "learned right-hand side": (
        system(LEARNED),
        ValueError,
        "captured a tensor that requires grad",
    ),
    "learned guess": (
        system(adjoint_guess=LEARNED),
        ValueError,
        "adjoint_guess requires grad, and a guess is not differentiated",
    ),
    "guess elsewhere": (
        system(adjoint_guess=ELSEWHERE),
        TypeError,
        "adjoint_guess at x is on meta, and x0 on cpu",
    ),
    "complex in single": (
        lambda: ba.solve(
            ba.FixedPoint(lambda x, t: 0.5 * x + t.real), ONE.to(torch.complex64), START
        ),
        TypeError,
        "theta is of torch.complex64 and x0 of torch.float64",
    ),
    "loss in single": (
        loss(lambda x, theta: x.sum().float()),
        TypeError,
        r"outer_loss\(x, theta\) is of torch.float32 and x0 of torch.float64",
    ),
    "loss elsewhere": (
        loss(lambda x, theta: ELSEWHERE.sum()),
        TypeError,
        "is on meta and x0 on cpu",
    ),
    "loss that reads": (loss(lambda x, theta: x.sum() * x.tolist()[0]), TypeError, READS),
    "loss that counts": (loss(lambda x, theta: x.sum() + BUFFER.add_(1)), ValueError, OUTSIDE),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own advice
@pytest.mark.parametrize("name", ARGUMENTS)
def test_tensors_that_do_not_go_together_are_named(name):
    call, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        call()


def theta_of(x):
    contraction = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    return bl.solve(contraction, x, jnp.zeros(3), solver=bl.FixedPointIteration()).value


CAPTURED = {
    "converted": lambda x: x * jnp.asarray(LEARNED),
    "returned": lambda x: (x, LEARNED),
    "used": lambda x: x * LEARNED.sum().item(),
    "a module": lambda x: x * jnp.asarray(torch.nn.Linear(3, 3).weight)[0],
    "inside a problem": lambda x: theta_of(x + jnp.asarray(LEARNED)),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_function_of_jax_that_captures_what_is_learned_is_refused(name):
    """Its gradient would be missing without a word."""
    with pytest.raises(ValueError, match=r"captured a tensor that requires grad, of shape \(3,"):
        ba.torch.function(CAPTURED[name])(ONE)


def test_a_function_of_jax_may_capture_what_is_not_learned():
    fixed = LEARNED.detach()
    found = ba.torch.function(lambda x: (x * jnp.asarray(fixed), LEARNED.detach()))(2 * ONE)
    assert torch.equal(found[0], 2 * ONE)
    assert torch.equal(found[1], ONE)


MEETINGS = {
    "a function": lambda x: torch.sin(x) + 1,
    "on the right": lambda x: x * LEARNED.detach(),
    "on the left": lambda x: LEARNED.detach() * x,
}


@pytest.mark.parametrize("name", MEETINGS)
def test_torch_in_a_function_of_jax_is_told_where_it_belongs(name):
    with pytest.raises(TypeError, match=r"It is a function of JAX.*are for bilevel_arrays\.solve"):
        ba.torch.function(MEETINGS[name])(ONE)


def test_a_hypergradient_refuses_a_start_of_another_kind():
    contraction = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    evaluate = ba.torch.hypergradient(lambda x, theta: jnp.sum(x), contraction)
    with pytest.raises(TypeError, match="theta is on cpu and x0 on meta"):
        evaluate(ONE, ELSEWHERE)
    with pytest.raises(TypeError, match=r"theta is of torch\.float64 and x0 of torch\.float32"):
        evaluate(ONE, torch.zeros(3))
    with pytest.raises(TypeError, match="rtol must be a real number, got tensor"):
        evaluate(ONE, START, budget=bl.Budget(iterations=2, rtol=LEARNED[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [torch.nonzero, lambda x: x[x > 0], lambda x: x.cpu()])
def test_what_waits_for_a_gpu_is_refused(operation):
    with pytest.raises(TypeError, match=r"waits for the device|moves a tensor"):
        ba.solve(ba.FixedPoint(mean_of(operation)), ONE.cuda(), START.cuda())
