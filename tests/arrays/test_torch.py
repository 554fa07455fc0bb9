"""JAX functions as functions of tensors: derivatives, memory, compilations, and what is refused."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.marks import others_slow

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch==2.13.0")
ba = pytest.importorskip("bilevel_arrays.torch")

START = jnp.zeros(3)


def objective(x, theta):
    """Convex, not quadratic, of a pytree θ."""
    return jnp.sum(jnp.cosh(x - theta["target"])) + 0.5 * jnp.exp(theta["weight"]) * jnp.sum(x**2)


PROBLEM = bl.Minimization(objective)


def outer_loss(x, theta):
    return jnp.sum(jnp.sin(x)) + theta["weight"] ** 2


def draw(seed=0, *, grad=True):
    source = torch.Generator().manual_seed(seed)
    return {
        "target": torch.randn(3, dtype=torch.float64, generator=source).requires_grad_(grad),
        "weight": torch.tensor(0.3, dtype=torch.float64).requires_grad_(grad),
    }


def as_jax(theta):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.detach().numpy()), theta)


TIGHT = bl.Budget(iterations=200, rtol=1e-14)
DESCENT = bl.GradientDescent(step_size=0.3)
PRIMAL = {"solver": DESCENT, "budget": TIGHT}
NEWTON = {"solver": bl.Newton(linear=bl.ConjugateGradient()), "budget": TIGHT}
ESTIMATORS = {
    "implicit": (PRIMAL, bl.Implicit(bl.ConjugateGradient()), TIGHT),
    "neumann": (PRIMAL, bl.Neumann(), TIGHT),
    "nystrom": (PRIMAL, bl.Nystrom(rank=3, damping=1e-9), None),
    "unrolled": ({"solver": DESCENT, "budget": bl.Budget(4)}, bl.Unrolled(), None),
    # Of Newton's method one step has the whole derivative.
    "one step": (NEWTON, bl.OneStep(), None),
}


def settings(name):
    given, estimator, adjoint = ESTIMATORS[name]
    return {**given, "estimator": estimator, "adjoint_budget": adjoint}


def solver_of(name):
    given = settings(name)
    return ba.function(lambda theta: bl.solve(PROBLEM, theta, START, **given).value)


@pytest.mark.parametrize("name", others_slow(ESTIMATORS, "implicit"))
def test_gradcheck_passes_on_every_estimator(name):
    solve = solver_of(name)
    theta = draw()
    assert torch.autograd.gradcheck(
        lambda target, weight: solve({"target": target, "weight": weight}), tuple(theta.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["implicit", "neumann"])
def test_second_derivatives_pass_gradgradcheck(name):
    solve = solver_of(name)
    theta = draw()
    assert torch.autograd.gradgradcheck(
        lambda target, weight: solve({"target": target, "weight": weight}), tuple(theta.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unrolled", "one step"])
def test_second_derivatives_that_an_estimator_has_not_are_refused_in_its_words(name):
    theta = draw()
    value = solver_of(name)(theta).sum()
    with pytest.raises(Exception, match=r"Use one of these, or Implicit|Use Implicit"):
        torch.autograd.grad(
            torch.autograd.grad(value, theta["target"], create_graph=True)[0].sum(),
            theta["target"],
        )


@pytest.mark.parametrize("name", others_slow(ESTIMATORS, "unrolled"))
def test_hypergradients_equal_those_of_jax(name):
    """The loss in JAX, in torch behind the solve, and as the report of bl.hypergradient."""
    theta = draw(1)
    expected = bl.hypergradient(
        outer_loss, PROBLEM, as_jax(theta), START, **settings(name), error=False
    )

    def in_jax(theta):
        return outer_loss(bl.solve(PROBLEM, theta, START, **settings(name)).value, theta)

    evaluate = ba.hypergradient(outer_loss, PROBLEM, **settings(name), error=False)
    start = torch.zeros(3, dtype=torch.float64)
    solve = solver_of(name)
    losses = {
        "jax": ba.function(in_jax),
        "torch": lambda theta: torch.sin(solve(theta)).sum() + theta["weight"] ** 2,
        "report": lambda theta: evaluate(theta, start).value,
    }
    for loss in losses.values():
        found = torch.autograd.grad(loss(theta), list(theta.values()))
        for gradient, other in zip(found, expected.gradient.values(), strict=True):
            np.testing.assert_allclose(gradient, other, rtol=1e-12, atol=1e-14)


def place_of(array):
    """Where the numbers lie; on the CPU programs are given NumPy's view of a tensor."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    return array.unsafe_buffer_pointer()


def test_a_program_makes_no_copy_of_what_it_is_given():
    """A hundred megabytes, read where they lie."""

    def most():
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

    total = ba.function(jnp.sum)
    x = torch.ones(12_500_000, dtype=torch.float64)
    total(x)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
        file.write("5")
    before = most()
    assert float(total(x)) == 12_500_000
    assert most() - before < 30e6


def test_a_thousand_round_trips_share_memory_and_none_of_it_stays(monkeypatch):
    """What goes in is seen where it lies, what comes out where JAX wrote it, both ways."""
    from bilevel_arrays.torch import wrapping

    seen, made = [], []

    def watched(function, returned):
        def watching(first, second, *rest):
            outcome = function(first, second, *rest)
            given = first if isinstance(first, list) else second  # inputs, or cotangents
            places = [given[0], jax.tree.leaves(returned(outcome))[0]]
            seen.append(tuple(map(place_of, places)))
            return outcome

        return watching

    original = wrapping.Program
    monkeypatch.setattr(wrapping, "Program", lambda *a: made.append(original(*a)) or made[-1])
    double = ba.function(lambda x: 2 * x)
    x = torch.ones(64, dtype=torch.float64, requires_grad=True)
    cotangent = torch.full((64,), 3.0, dtype=torch.float64)
    torch.autograd.grad(double(x), x, cotangent)
    made[0].forward = watched(made[0].forward, lambda outcome: outcome[0].smooth)
    made[0].backward = watched(made[0].backward, lambda outcome: outcome[0])
    gc.collect()
    arrays = len(jax.live_arrays())
    for _ in range(1000):
        y = double(x)
        (gradient,) = torch.autograd.grad(y, x, cotangent)
        assert seen[-2] == (x.data_ptr(), y.data_ptr())
        assert seen[-1] == (cotangent.data_ptr(), gradient.data_ptr())
    assert float(gradient[0]) == 6
    del y, gradient
    gc.collect()
    assert len(jax.live_arrays()) <= arrays


@pytest.mark.slow
def test_memory_of_the_process_does_not_grow():
    """A quarter of a megabyte a call would be 262 of them."""

    def resident():
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * 4096

    double = ba.function(lambda x: x * x)
    x = torch.ones(32_768, dtype=torch.float64, requires_grad=True)
    for _ in range(100):
        double(x).sum().backward()
    before = resident()
    for _ in range(1000):
        double(x).sum().backward()
    assert resident() - before < 20e6


LAYOUTS = {
    "contiguous": lambda: torch.arange(12.0).reshape(3, 4),
    "transposed": lambda: torch.arange(12.0).reshape(4, 3).T,
    "strided": lambda: torch.arange(24.0).reshape(3, 8)[:, ::2],
    "offset": lambda: torch.arange(13.0)[1:].reshape(3, 4),
    "expanded": lambda: torch.arange(4.0).expand(3, 4),
    "empty": lambda: torch.zeros(0, 4),
    "number": lambda: torch.tensor(3.0),
    "read-only": lambda: torch.from_numpy(_read_only()),
    "half": lambda: torch.arange(12.0).reshape(3, 4).bfloat16(),
}


def _read_only():
    values = np.arange(12.0).reshape(3, 4)
    values.flags.writeable = False
    return values


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_arrives_as_it_is(name):
    x = LAYOUTS[name]()
    before = x.clone()
    leaf = x.detach().requires_grad_()
    y = ba.function(lambda x: 3 * x)(leaf)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert torch.equal(y, 3 * before)
    y.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(before, 3))
    assert torch.equal(x, before)


def test_lazy_conjugates_and_complex_derivatives_are_those_of_torch():
    z = torch.tensor([1 + 2j, -0.5 + 1j], dtype=torch.complex128, requires_grad=True)
    square = ba.function(lambda z: jnp.sin(z) * z * jnp.conj(z))
    assert torch.equal(ba.function(lambda z: z * 1)(z.detach().conj()), z.detach().conj())
    assert torch.autograd.gradcheck(square, (z,))
    found = torch.autograd.grad(square(z).abs().sum(), z)[0]
    expected = torch.autograd.grad((torch.sin(z) * z * z.conj()).abs().sum(), z)[0]
    assert torch.allclose(found, expected, atol=1e-12)


def test_outputs_never_share_memory_with_anything():
    """In-place operations of torch must not reach an input, a constant of JAX, or one another."""
    constant = jnp.arange(3.0)
    both = ba.function(lambda x: (x, constant, constant, x))
    x = torch.ones(3, dtype=torch.float64)
    outputs = both(x)
    for tensor in outputs:
        tensor.add_(100)
    assert torch.equal(x, torch.ones(3, dtype=torch.float64))
    assert np.array_equal(constant, [0, 1, 2])
    assert [float(tensor[0]) for tensor in outputs] == [101, 100, 100, 101]
    assert [float(tensor[0]) for tensor in both(x)] == [1, 0, 0, 1]


def test_it_compiles_once_for_each_shape_dtype_and_set_of_gradients():
    traced = []

    def function(theta, budget, flag=True):
        traced.append(jax.tree.map(jnp.shape, theta))
        problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
        given = {"solver": bl.FixedPointIteration(), "budget": budget}
        return bl.solve(problem, theta, jnp.zeros_like(theta), **given).value

    solve = ba.function(function)
    for count in range(1, 6):  # a budget is a number
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        y = solve(x, bl.Budget(iterations=count))
        assert float(y[0].detach()) == 2 - 2.0 ** (1 - count)
        y.sum().backward()
    assert len(traced) == 1
    with torch.no_grad():
        solve(x, bl.Budget(iterations=2))
        solve(x, bl.Budget(iterations=3))
    assert len(traced) == 2
    solve(torch.ones(3, dtype=torch.float64), bl.Budget(iterations=2))
    assert len(traced) == 3
    solve(torch.ones(3, dtype=torch.float32), bl.Budget(iterations=2))
    assert len(traced) == 4
    solve(torch.ones(3, dtype=torch.float32), bl.Budget(iterations=2), flag=False)
    assert len(traced) == 5


def test_pytrees_go_in_and_out_and_discrete_ones_have_no_gradient():
    def function(batch, *rest, scale):
        return {
            "sum": batch["x"] + rest[0] + scale,
            "largest": jnp.argmax(batch["x"]),
            "none": None,
            "mask": batch["x"] > 0,
        }

    x = torch.tensor([1.0, 3.0, -1.0], requires_grad=True)
    index = torch.tensor([1, 2])
    found = ba.function(function)({"x": x, "index": index}, torch.ones(3), scale=2.0)
    assert torch.equal(found["sum"], x + 3)
    assert int(found["largest"]) == 1
    assert found["none"] is None
    assert found["mask"].dtype == torch.bool
    assert not found["mask"].requires_grad
    found["sum"].sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_a_solution_comes_out_with_its_value_in_tensors():
    theta = draw()
    solve = ba.function(
        lambda theta: bl.solve(PROBLEM, theta, START, solver=DESCENT, budget=bl.Budget(3))
    )
    solution = solve(theta)
    assert isinstance(solution.value, torch.Tensor)
    assert solution.value.requires_grad
    assert int(solution.iterations) == 3
    assert solution.diagnosis.startswith("BUDGET")


def test_a_hypergradient_is_handed_out_and_not_computed_again():
    counts = []

    def counted(x, theta):
        counts.append(1)
        return outer_loss(x, theta)

    evaluate = ba.hypergradient(counted, PROBLEM, solver=DESCENT)
    theta, start = draw(), torch.zeros(3, dtype=torch.float64)
    result = evaluate(theta, start, budget=bl.Budget(100, rtol=1e-12))
    traced = len(counts)
    (3 * result.value).backward()
    again = evaluate(theta, start, budget=bl.Budget(50, rtol=1e-12))
    assert len(counts) == traced
    for name, leaf in theta.items():
        np.testing.assert_allclose(leaf.grad, 3 * result.gradient[name], rtol=1e-15)
    assert result.diagnosis.startswith("Neither solve is short")
    assert float(result.error.total) < 1e-8
    with pytest.raises(RuntimeError, match=r"no second derivative.*a number that came with"):
        torch.autograd.grad(again.value, theta["target"], create_graph=True)
    with pytest.raises(ValueError, match="x0 requires grad, and it belongs to an argument"):
        evaluate(theta, start.requires_grad_())


def test_probes_report_what_the_backward_pass_did():
    def function(theta, probe):
        given = {"solver": DESCENT, "budget": bl.Budget(9), "adjoint_budget": bl.Budget(2)}
        return bl.solve(PROBLEM, theta, START, probe=probe, **given).value

    theta = draw()
    counting = ba.function(function, probe=bl.Probe.zeros())
    value, report = counting(theta)
    with pytest.raises(RuntimeError, match=r"no backward pass has gone through this call"):
        _ = report.probe
    assert repr(report) == "Report(no backward pass yet)"
    value.sum().backward()
    assert (int(report.probe.solves), int(report.probe.primal_iterations)) == (1, 9)
    value, report = ba.function(function, probe=bl.AdjointProbe.zeros(START))(theta)
    torch.autograd.grad(value.sum(), theta["target"], create_graph=True)
    assert report.probe.solution().iterations == report.probe.iterations > 0
    assert "Report(AdjointProbe(" in repr(report)


def test_it_trains_inside_a_module():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 3, dtype=torch.float64)
            self.solve = solver_of("implicit")

        def forward(self, x):
            return self.solve({"target": self.linear(x), "weight": x.sum()})

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    goal, x = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.5, 0.1]).double()
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = ((model(x) - goal) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


def test_what_was_overwritten_before_the_backward_pass_is_noticed():
    double = ba.function(lambda x: x * x)
    x = torch.ones(3, requires_grad=True)
    y = double(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    z = double(x)
    z.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        z.sum().backward()


def test_a_backward_pass_in_another_thread_keeps_the_precision():
    with jax.enable_x64(True):
        y = solver_of("implicit")(draw()).sum()
    theta_gradients = []
    with jax.enable_x64(False):
        thread = threading.Thread(target=lambda: theta_gradients.append(y.backward()))
        thread.start()
        thread.join()
    assert theta_gradients == [None]


MISUSES = {
    "no function": (
        lambda: ba.function(3),
        TypeError,
        "fn should be a function of arrays, got 3 of type int",
    ),
    "one name": (
        lambda: ba.function(lambda x: x, constant="x"),
        TypeError,
        r"Write constant=\['x'\]",
    ),
    "unknown name": (
        lambda: ba.function(lambda x: x, constant=["y"]),
        ValueError,
        r"constant names 'y', and <lambda> takes \(x\)",
    ),
    "no probe": (
        lambda: ba.function(lambda x: x, probe=True),
        TypeError,
        "probe should be bl.Probe.zeros",
    ),
    "precisions": (
        lambda: ba.function(lambda x, y: x)({"a": torch.ones(2)}, torch.ones(2).double()),
        TypeError,
        r"x\['a'\] is of torch.float32 and y of torch.float64",
    ),
    "complex precisions": (
        lambda: ba.function(lambda x, y: x)(torch.ones(2), y=torch.ones(2).to(torch.complex128)),
        TypeError,
        "x is of torch.float32 and y of torch.float64",
    ),
    "device": (
        lambda: ba.function(lambda x: x)(torch.ones(2, device="meta")),
        TypeError,
        "x is on meta, and JAX has no such device",
    ),
    "sparse": (
        lambda: ba.function(lambda x: x)(torch.eye(2).to_sparse()),
        TypeError,
        "x is a tensor of layout torch.sparse_coo",
    ),
    "constant": (
        lambda: ba.function(lambda x, batch: x, constant=["batch"])(
            torch.ones(2), [torch.ones(1), torch.ones(2, requires_grad=True)]
        ),
        ValueError,
        r"batch\[1\] requires grad, and it belongs to an argument that was declared constant",
    ),
    "constant rest": (
        lambda: ba.function(lambda *rest: rest[0], constant=["rest"])(
            torch.ones(2), torch.ones(2, requires_grad=True)
        ),
        ValueError,
        r"args\[1\] requires grad",
    ),
    "unhashable": (
        lambda: ba.function(lambda x, y: x)(torch.ones(2), {1, 2}),
        TypeError,
        r"y is \{1, 2\} of type set, which is no tensor",
    ),
    "key": (
        lambda: ba.function(lambda x: jax.random.key(0))(torch.ones(2)),
        TypeError,
        "which no tensor can hold",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_in_words(name):
    call, kind, message = MISUSES[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transformations_of_torch_say_that_they_do_not_go_through():
    double = ba.function(lambda x: 2 * x)
    x = torch.ones(2)
    for transformed in (torch.func.grad(lambda x: double(x).sum()), torch.func.vmap(double)):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transformed(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="forward mode AD"):
            double(dual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.int64])
def test_nothing_is_rounded_without_a_word(dtype):
    with jax.enable_x64(False):
        with pytest.raises(TypeError, match=r"x\[0\] is torch\..*jax_enable_x64"):
            ba.function(lambda x: x[0])([torch.ones(2, dtype=dtype)])
        single = ba.function(lambda x: x / 3)(torch.ones(2))
    assert single.dtype == torch.float32


def test_devices_are_not_mixed():
    with pytest.raises(
        TypeError, match=r"x\['a'\] is on cpu and y on meta. Move all tensors to one"
    ):
        ba.function(lambda x, y: x)({"a": torch.ones(2)}, torch.ones(2, device="meta"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_torch_compile_breaks_its_graph_there_and_says_why():
    double = ba.function(lambda x: 2 * x)
    compiled = torch.compile(lambda x: double(x + 1) - 1, backend="eager")
    x = torch.ones(3, requires_grad=True)
    compiled(x).sum().backward()
    assert torch.equal(compiled(x), 2 * x + 1)
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    whole = torch.compile(lambda x: double(x) + 1, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"which torch\.compile leaves outside"):
        whole(x)


@pytest.mark.gpu
class TestOnAnAccelerator:
    """What needs one: the same numbers, nothing through the host, streams of torch's own."""

    def test_nothing_goes_through_the_host(self):
        solve = solver_of("implicit")
        theta = {name: leaf.detach().cuda() for name, leaf in draw().items()}
        theta = {name: leaf.requires_grad_() for name, leaf in theta.items()}
        solve(theta).sum().backward()  # compiles
        with jax.transfer_guard("disallow"):
            y = solve(theta)
            y.sum().backward()
        on_host = draw()
        expected = torch.autograd.grad(solver_of("implicit")(on_host).sum(), on_host["target"])[0]
        assert y.device.type == "cuda"
        torch.testing.assert_close(theta["target"].grad.cpu() / 2, expected, rtol=1e-10, atol=0)

    def test_memory_is_shared(self):
        x = torch.ones(1024, device="cuda")
        from bilevel_arrays.torch.exchange import as_array, as_tensor

        array = as_array(x)
        assert array.unsafe_buffer_pointer() == x.data_ptr()
        assert as_tensor(array).data_ptr() == x.data_ptr()

    def test_it_waits_for_the_stream_of_the_caller_and_the_caller_for_it(self):
        double = ba.function(lambda x: 2 * x)
        double(torch.ones(4_000_000, device="cuda"))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = torch.zeros(4_000_000, device="cuda")
            for _ in range(200):
                x = x + 1
            y = double(x) + 1
        stream.synchronize()
        assert float(y.min()) == float(y.max()) == 401

    def test_devices_are_not_mixed(self):
        with pytest.raises(TypeError, match=r"x is on cuda:0 and y on cpu"):
            ba.function(lambda x, y: x)(torch.ones(2, device="cuda"), torch.ones(2))
