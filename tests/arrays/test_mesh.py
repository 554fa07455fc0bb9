"""Operators on grids in blocks over many devices: the numbers of one, and what is sent."""

from typing import Any

import jax
import numpy as np
import pytest

import bilevel_pde as pde
from bilevel_arrays import mesh as over
from tests.arrays import mesh_program as program
from tests.arrays import processes

ROUNDING = 1e-13
COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def one_device() -> dict[str, Any]:
    return program.results(None)


def test_eight_devices_do_what_one_does():
    found = processes.on_devices("quick", 8)
    assert found["matvec"] < ROUNDING
    assert found["rmatvec"] < ROUNDING
    assert found["value"] < 1e-10
    assert found["iterations"][0] == found["iterations"][1] > 10
    assert "'x', 'y'" in found["lies"]
    # Blocks of 4 × 4 out of 16 × 8 points: two applications, each 3 · 2 · 8 numbers across x, and
    # 2 · 2 · 16 across y, which closes on itself. Upwind reads only one side of the second one.
    assert found["traffic"] == found["sent"]
    said = found["refused"]
    assert (
        "4 devices of mesh axis 'x' should divide the 10 points of the grid's axis 1"
        in (said["not divided"])
    )
    assert "got 2 left over. Take 8 points" in said["not divided"]
    assert "at least as thick as the 2 points that the Stencil reads" in said["too thin"]
    assert "got 1 of 8 points on 8 devices. Cut this axis into at most 4" in said["too thin"]
    for name in ("elsewhere", "elsewhere, transposed"):
        assert "operator's mesh, [0, 1, 2, 3, 4, 5, 6, 7], got one on devices [0, 1]" in said[name]
    assert "should be partitioned alike" in said["another layout"]
    assert "should divide the 10 points" in said["heat"]
    assert "should divide axis 0 of the array" in said["place"]
    assert "product of 8, the number of devices, got (3, 2)" in said["shape"]


def test_a_mesh_that_cannot_be_is_refused():
    grid = pde.Grid((4, 4))
    laplace, mesh = pde.laplacian(grid), over.device_mesh()
    with pytest.raises(ValueError, match=r"axes of the mesh, \('devices',\), got 'rows'"):
        over.partition(laplace, mesh, "rows")
    with pytest.raises(ValueError, match=r"each of the grid's 2 axes, got 3"):
        over.partition(laplace, mesh, ("devices", None, None))
    with pytest.raises(ValueError, match="each mesh axis once"):
        over.partition(laplace, mesh, ("devices", "devices"))
    three = over.device_mesh((1, 1, 1))
    with pytest.raises(ValueError, match=r"3 axes \('x', 'y', 'z'\) and the grid 2"):
        over.partition(laplace, three)
    with pytest.raises(TypeError, match=r"should be a jax\.sharding\.Mesh, got int"):
        over.partition(laplace, 4)
    explicit = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(TypeError, match=r"type Auto.*got 'x'"):
        over.partition(laplace, explicit)
    with pytest.raises(ValueError, match="axes of the mesh"):
        over.place(np.ones(4), mesh, "rows")
    with pytest.raises(ValueError, match="1 different ones"):
        over.device_mesh(1, ("a", "b"), devices=jax.devices()[:1])


def test_what_is_not_on_a_regular_grid_is_refused():
    grid, mesh = pde.Grid((4, 4)), over.device_mesh()
    matrix = pde.from_scipy(pde.laplacian(grid).to_scipy())
    with pytest.raises(TypeError, match="on a regular grid"):
        over.partition(matrix, mesh)
    with pytest.raises(TypeError, match=r"steppers Heat and AdvectionDiffusion, got Burgers"):
        over.partition(pde.Burgers(grid, 0.1, 0.1), mesh)
    with pytest.raises(TypeError, match="partitioned one, got Stencil"):
        over.halo_traffic(pde.laplacian(grid))


def test_collectives_of_a_program_are_read_with_their_loops():
    text = """HloModule jit_f

%body (p: (f32[2])) -> (f32[2]) {
  %q = f32[2,3]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}, metadata={}
  ROOT %r = (f32[2]) tuple(%q)
}

%condition (p: (f32[2])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %a = (f64[], bf16[4]{0}) all-reduce(%p, %p), replica_groups={}, to_apply=%add
  %s = (f64[5]{0}, f64[5]{0}) collective-permute-start(%p), source_target_pairs={{0,1}}
  %w = (f32[2]) while(%t), condition=%condition, body=%body
  ROOT %g = f32[2] get-tuple-element(%w), index=0
}
"""
    from bilevel_arrays.mesh.collectives import read_collectives

    assert set(read_collectives(text)) == {
        over.Collective("all-reduce", 16, 0, 0),
        over.Collective("collective-permute", 40, 40, 0),
        over.Collective("collective-permute", 24, 48, 1),
    }


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal counts, and numbers to 1e-10 of the largest."""
    for name, one in expected.items():
        many = found[name]
        assert many["iterations"] == one["iterations"], name
        for number in {"value", "gradient", "loss"} & one.keys():
            scale = np.max(np.abs(one[number]))
            defect = np.max(np.abs(np.array(many[number]) - np.array(one[number])))
            assert defect <= 1e-10 * scale, (name, number)


@pytest.mark.slow
def test_solves_and_hypergradients_on_simulated_devices(one_device: dict[str, Any]):
    assert one_device["poisson"]["status"] == 0
    assert 5 <= one_device["poisson"]["iterations"][0] <= 12
    found = processes.on_devices("on_meshes", max(COUNTS))
    for count in COUNTS:
        agree(found[str(count)], one_device)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_solves_and_hypergradients_in_several_processes(count: int, one_device: dict[str, Any]):
    for found in processes.in_processes("results", count):
        agree(found, one_device)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_operator_under_every_condition_on_every_mesh():
    found = processes.on_devices("applied", 8)
    assert len(found) == 85
    for name, (defect, traffic, forth, back) in found.items():
        assert defect < ROUNDING, name
        # Terms of a sum may read the same rows, which the compiler sends once.
        assert forth == traffic or (name.endswith("sum") and forth < traffic), name
        # A symmetric operator is its own transpose; another sends back what it was sent.
        assert back == traffic, name
    # 2 · 7 sides of 16 points, of 8 bytes; closed, 2 · 8.
    assert found["slabs dirichlet laplacian"][1] == 2 * 7 * 16 * 8
    assert found["slabs periodic laplacian"][1] == 2 * 8 * 16 * 8
    # Two copies of columns in four, 2 · 3 sides of 32 points each.
    assert found["columns dirichlet laplacian"][1] == 2 * 2 * 3 * 32 * 8
    assert found["blocks dirichlet laplacian"][1] == (2 * 3 * 16 + 2 * 1 * 32) * 8


@pytest.mark.slow
@pytest.mark.exhaustive
def test_derivatives_and_batches_are_those_of_one_device():
    for name, defect in processes.on_devices("derived", 8).items():
        assert defect < ROUNDING, name


@pytest.mark.slow
@pytest.mark.exhaustive
def test_preconditioners_take_as_many_iterations_as_on_one_device():
    for name, (status, one, many, defect) in processes.on_devices("preconditioned", 8).items():
        assert status == 0, name
        assert one == many, name
        assert defect < 1e-10, name


@pytest.mark.slow
def test_a_heat_step_sends_the_surface_an_iteration_and_nothing_else():
    found = processes.on_devices("stepped", 8)
    surface = (2 * 8 * 8 + 2 * 2 * 16 * 8) * 8
    assert found["surface"] == surface
    # Sums and halos: no field is ever gathered. Before the loop the coefficient's halo and the
    # first residual, in it one application, and one where a solve is confirmed.
    assert found["kinds"] == ["all-reduce", "collective-permute"]
    assert found["depths"] == {"0": 2 * surface, "1": surface, "2": surface}


@pytest.mark.slow
def test_a_cycle_sends_the_surfaces_of_its_levels():
    found = processes.on_devices("cycled", 8)

    def surface(n: int) -> int:
        return (2 * 4 * n + 2 * 2 * n) * 8

    def transfer(n: int) -> int:
        # A row of coarse points across x, then across y one as long as the finer grid along x.
        return (2 * 4 * n // 2 + 2 * 2 * n) * 8

    # On each cut grid, 32² and 16², two sweeps of degree 3, which are 2 + 3 applications, a
    # residual, and a transfer there and back; and the residual of the iteration.
    applications = 6 * surface(32) + 6 * surface(16) + surface(32)
    assert found["collective-permute 1"] == applications + 2 * transfer(32) + 2 * transfer(16)
    assert found["collective-permute 0"] == surface(32)
    # The grid of 8² is whole everywhere: blocks of 2 × 4 are gathered along x, then along y.
    assert found["all-gather 1"] == (8 * 4 + 8 * 8) * 8
