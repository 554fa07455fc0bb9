"""Inner problems in PyTorch: autograd through the solution, and functions that break it."""

import numpy as np
import pytest

import bilevel as bl
import bilevel_arrays as ba

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch==2.13.0")

TIGHT = bl.Budget(iterations=500, rtol=1e-13)
START = torch.zeros(3, dtype=torch.float64)
DESCENT = {"solver": bl.GradientDescent(step_size=0.3), "budget": TIGHT, "adjoint_budget": TIGHT}


def objective(x, theta):
    own = torch.cosh(x - theta["target"]).sum()
    return own + 0.5 * torch.exp(theta["weight"]) * (x**2).sum()


MINIMUM = ba.Minimization(objective)


def draw(*, grad=True):
    target = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64, requires_grad=grad)
    return {"target": target, "weight": torch.tensor(0.2).double().requires_grad_(grad)}


def test_solutions_join_autograd():
    theta = draw()
    assert torch.autograd.gradcheck(
        lambda target, weight: (
            ba.solve(MINIMUM, {"target": target, "weight": weight}, START, **DESCENT).value
        ),
        tuple(theta.values()),
    )
    solution = ba.solve(MINIMUM, theta, START, **DESCENT)
    assert solution.diagnosis.startswith("CONVERGED")
    torch.sin(solution.value).sum().backward()
    result = ba.hypergradient(
        lambda x, t: torch.sin(x).sum(), MINIMUM, draw(grad=False), START, **DESCENT
    )
    for name, leaf in theta.items():
        torch.testing.assert_close(leaf.grad, result.gradient[name], rtol=1e-12, atol=1e-14)


def test_what_needs_no_gradient_has_none():
    with torch.no_grad():
        assert not ba.solve(MINIMUM, draw(), START, **DESCENT).value.requires_grad
    assert not ba.solve(MINIMUM, draw(grad=False), START, **DESCENT).value.requires_grad
    theta = {**draw(), "count": torch.tensor(3)}
    assert ba.solve(MINIMUM, theta, START, **DESCENT).value.requires_grad
    with torch.no_grad():
        result = ba.hypergradient(lambda x, t: x.sum(), MINIMUM, theta, START, **DESCENT)
    assert result.gradient["count"] is None
    numbers = {**draw(), "scale": 2.0}
    result = ba.hypergradient(lambda x, t: x.sum(), MINIMUM, numbers, START, **DESCENT)
    assert result.gradient["scale"] is None  # autograd sees no number
    unread = {**draw(), "other": torch.ones(2).double()}
    result = ba.hypergradient(lambda x, t: x.sum(), MINIMUM, unread, START, **DESCENT)
    assert torch.equal(result.gradient["other"], torch.zeros(2).double())


def test_second_derivatives_are_refused():
    theta = draw()
    value = ba.solve(MINIMUM, theta, START, **DESCENT).value
    with pytest.raises(
        RuntimeError, match=r"there is no second derivative\. Leave create_graph out"
    ):
        torch.autograd.grad(value.sum(), theta["target"], create_graph=True)


def test_what_was_overwritten_before_the_backward_pass_is_noticed():
    theta = draw()
    value = ba.solve(MINIMUM, theta, START, **DESCENT).value
    with torch.no_grad():
        theta["target"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_a_captured_tensor_that_requires_grad_is_noticed(grad):
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)
    problem = ba.FixedPoint(lambda x, t: 0.1 * torch.tanh(layer(x)) + t)
    t = torch.ones(3, dtype=torch.float64, requires_grad=grad)
    with pytest.raises(
        ValueError, match="it captured a tensor that requires grad, such as the par"
    ):
        ba.solve(problem, t, START)
    with torch.no_grad():
        assert ba.solve(problem, t, START).diagnosis.startswith("CONVERGED")
    minimum = ba.Minimization(lambda x, t: ((x - layer.bias) ** 2).sum())
    with pytest.raises(ValueError, match="Minimization: it captured a tensor"):
        ba.solve(minimum, None, START, **DESCENT)

    def mapping(x, theta):
        return 0.1 * torch.tanh(torch.func.functional_call(layer, theta, (x,)))

    opened = ba.FixedPoint(mapping)
    ba.solve(opened, dict(layer.named_parameters()), START).value.sum().backward()
    assert float(layer.bias.grad.abs().sum()) > 0


def test_a_gradient_in_torch_is_differentiated_by_autograd():
    theta = draw(grad=False)

    def gradient(x, t):
        return torch.sinh(x - t["target"]) + torch.exp(t["weight"]) * x

    found = [
        ba.hypergradient(lambda x, t: torch.sin(x).sum(), problem, theta, START, **DESCENT).gradient
        for problem in (MINIMUM, ba.Minimization(gradient=gradient))
    ]
    for name, leaf in found[0].items():
        torch.testing.assert_close(found[1][name], leaf, rtol=1e-12, atol=0)


def test_operators_without_a_transpose_are_transposed_by_autograd():
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    problem = ba.LinearSystem(lambda t: lambda v: t * (matrix @ v), torch.ones(2).double())
    t = torch.tensor(2.0, dtype=torch.float64)
    found = ba.hypergradient(
        lambda x, t: x[0], problem, t, torch.zeros(2).double(), solver=bl.BiCGStab()
    )
    x = torch.linalg.solve(2 * matrix, torch.ones(2).double())
    torch.testing.assert_close(found.gradient, -x[0] / 2)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")  # torch's own advice
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_tensors_have_a_diagonal_and_a_transpose(kind):
    dense = torch.tensor([[4.0, 1.0, 0.0], [0.5, 5.0, 0.0], [0.0, 2.0, 3.0]]).double()
    problem = ba.LinearSystem(getattr(dense, kind)(), lambda t: t)
    t = torch.tensor([1.0, 2.0, 3.0]).double()
    result = ba.hypergradient(
        lambda x, t: x[0] - x[1],
        problem,
        t,
        torch.zeros(3).double(),
        solver=bl.Jacobi(),
        estimator=bl.Implicit(bl.Jacobi()),
        budget=TIGHT,
        adjoint_budget=TIGHT,
    )
    torch.testing.assert_close(result.primal.value, torch.linalg.solve(dense, t))
    pulled = torch.linalg.solve(dense.T, torch.tensor([1.0, -1.0, 0.0]).double())
    torch.testing.assert_close(result.gradient, pulled)
    one = ba.solve(problem, t, torch.zeros(3).double(), solver=bl.Jacobi(), budget=bl.Budget(1))
    torch.testing.assert_close(one.value, t / torch.diagonal(dense))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own advice
def test_sparse_matrices_may_be_made_of_theta():
    def operator(t):
        places = torch.tensor([[0, 1], [0, 1]])
        return torch.sparse_coo_tensor(places, t, (2, 2))

    problem = ba.LinearSystem(
        operator, torch.ones(2).double(), symmetric=True, positive_definite=True
    )
    t = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
    ba.solve(problem, t, torch.zeros(2).double()).value.sum().backward()
    torch.testing.assert_close(t.grad, -(t.detach() ** -2))


def in_place(x, t):
    x += 1
    return 0.5 * x + t


def theta_in_place(x, t):
    t += 1
    return 0.5 * x + t


BAD = {
    "item": lambda x, t: 0.5 * x * (1.0 + x.sum().item()),
    "if": lambda x, t: 0.5 * x if x.sum() > 0 else 0.25 * x,
    "float": lambda x, t: 0.5 * x + float(t.sum()),
    "in place": in_place,
    "theta in place": theta_in_place,
    "numpy": lambda x, t: torch.as_tensor(0.5 * np.cos(x.numpy())) + 0 * t,
    "detached": lambda x, t: 0.5 * x.detach(),
}
READS, WRITES = "reads a number out of a tensor", "writes into its argument"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("item", TypeError, READS),
        ("if", TypeError, READS),
        ("float", TypeError, READS),
        ("in place", ValueError, WRITES),
        ("theta in place", ValueError, WRITES),
        ("numpy", TypeError, "autograd sees no derivative of it"),
        ("detached", ValueError, "nothing reads theta"),
    ],
)
def test_functions_that_break_the_derivative_are_refused(kind, error, message):
    theta = torch.ones(3, dtype=torch.float64)
    with pytest.raises(error, match=message):
        ba.hypergradient(lambda x, t: x.sum(), ba.FixedPoint(BAD[kind]), theta, START)
    if error is TypeError and message is READS:
        with pytest.raises(error, match=r"outer_loss\(x, theta\) " + READS):
            ba.hypergradient(
                lambda x, t: x.sum() * x.sum().item(),
                ba.FixedPoint(lambda x, t: 0.5 * x + t),
                theta,
                START,
            )


def test_an_objective_that_leaves_torch_is_refused():
    problem = ba.Minimization(lambda x, t: x.detach().sum())
    with pytest.raises(TypeError, match="autograd sees no derivative of it"):
        ba.solve(problem, None, START, solver=bl.GradientDescent(0.1))
    problem = ba.Minimization(lambda x, t: x)
    with pytest.raises(TypeError, match=r"must return a real scalar, got shape \(3,\)"):
        ba.solve(problem, None, START, solver=bl.GradientDescent(0.1))


def test_tensors_that_do_not_go_together_are_refused():
    start = START.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"x0 requires grad, and the start is not differentiated"):
        ba.solve(MINIMUM, draw(), start, **DESCENT)
    with pytest.raises(
        TypeError, match=r"theta\['target'\] is of torch.float32 and x0 of torch.fl"
    ):
        ba.solve(MINIMUM, {**draw(), "target": torch.ones(3)}, START, **DESCENT)
    theta = {**draw(), "target": torch.ones(3, device="meta", dtype=torch.float64)}
    with pytest.raises(TypeError, match=r"theta\['target'\] is on meta and x0 on cpu"):
        ba.solve(MINIMUM, theta, START, **DESCENT)
    matrix = torch.eye(3, dtype=torch.float64, device="meta")
    with pytest.raises(TypeError, match="the matrix is on meta and the unknown on cpu"):
        ba.solve(ba.LinearSystem(lambda t: matrix, START), None, START)


@pytest.mark.gpu
def test_a_solve_stays_on_the_device():
    theta = {name: leaf.detach().cuda().requires_grad_() for name, leaf in draw().items()}
    value = ba.solve(MINIMUM, theta, START.cuda(), **DESCENT).value
    value.sum().backward()
    on_host = draw()
    ba.solve(MINIMUM, on_host, START, **DESCENT).value.sum().backward()
    assert value.device.type == "cuda"
    torch.testing.assert_close(theta["target"].grad.cpu(), on_host["target"].grad)
