"""The tiling of triton_kernels/launch.py: the interpreter with the tiles and index types of a GPU."""

import pytest
import torch
from policy import DTYPES, assert_bitwise

import pynn
from pynn.diffusion import Schedule

pytest.importorskip("triton")
from pynn.triton_kernels import diffusion, launch

T = 20
SCHEDULE = Schedule.cosine(T)


@pytest.fixture(params=["interpret"])
def interpreted(request):
    if reason := pynn.backends.unavailable[request.param]:
        pytest.skip(f"{request.param}: {reason}")


@pytest.mark.parametrize("inner", [1, 2, 5, 8, 31, 100, 128, 129, 784, 1000, 1025, 3072, 4097, 12288, 10**6, 2**33])
@pytest.mark.parametrize("tile", [512, 1024, 2048, 8192])
def test_columns(inner, tile):
    columns = launch.columns_for(inner, tile)
    assert columns & (columns - 1) == 0
    assert 8 <= columns <= tile
    idle = -inner % columns
    assert idle <= inner // 8 or columns <= 128
    if columns < tile and inner >= 128:  # no wider tile would have been as good
        assert -inner % (2 * columns) > inner // 8


@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "inner"), [(3, 37), (2, 1100), (40, 8), (1, 2051), (2, 3076)])
def test_tiles_of_a_gpu(interpreted, monkeypatch, index, dtype, batch, inner):
    monkeypatch.setitem(launch._CONFIGS, "interpret", launch._CONFIGS["cuda"])
    if index == "int64":
        monkeypatch.setattr(launch, "_INT32", 0)
    generator = torch.Generator().manual_seed(inner)
    x, output = (torch.randn(batch, inner, generator=generator).to(dtype) for _ in range(2))
    t, key = torch.randint(T, (batch,), generator=generator), torch.tensor([-3, 2**63 - 5])  # the counter overflows
    table = SCHEDULE.reverse_table("v")
    jump = (x, t, None, SCHEDULE.forward_table, None, key, True)
    reverse = (x, output, None, t, table, -0.3, 0.7, None, key, True)  # bounds that float32 cannot hold
    for name, args in (("normal", (x, key)), ("forward_jump_fwd", jump), ("reverse_step_fwd", reverse)):
        expected, got = getattr(torch.ops.pynn, name)(*args), getattr(diffusion, name)(*args)
        for a, b in zip(got, expected, strict=True):
            assert_bitwise(a, b, name)
    loss = (output, x, t, SCHEDULE.loss_table("v"), None, key)
    tolerance = 1e-14 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(
        diffusion.diffusion_loss_fwd(*loss), torch.ops.pynn.diffusion_loss_fwd(*loss), rtol=tolerance, atol=0
    )


def test_timestep_outside_the_table(interpreted):
    """The functions are called without the check of CPU tensors: as on a GPU, nobody has looked at the values of t."""
    t, x = torch.tensor([3, -1, T, 2**40, -(2**62), T - 1]), torch.randn(6, 33)
    forward, loss_table, ones = SCHEDULE.forward_table, SCHEDULE.loss_table(), torch.ones(6)
    table, key = SCHEDULE.reverse_table("v", "learned_range"), torch.tensor([1, 2])
    for result in (
        diffusion.forward_jump_fwd(x, t, None, forward, x, None, False)[0],
        diffusion.forward_jump_bwd(x, t, None, forward, False),
        diffusion.reverse_step_fwd(x, x, x, t, table, -1.0, 1.0, None, key, False)[0],
        *diffusion.reverse_step_bwd(x, x, x, x, t, table, None, None, None, key),
        diffusion.diffusion_loss_fwd(x, x, t, loss_table, x, None)[:, None],
        *diffusion.diffusion_loss_bwd(ones, x, x, t, loss_table, x, None, True),
    ):
        assert result[[0, 5]].isfinite().all()
        assert result[1:5].isnan().all()


def test_later_start_of_a_jump(interpreted):
    """s >= t has no jump: NaN, as in the C++ kernels."""
    s, t, x = torch.tensor([-2, 5, 6, 4]), torch.tensor([5, 5, 5, 5]), torch.randn(4, 8)
    y = diffusion.forward_jump_fwd(x, t, s, SCHEDULE.forward_table, x, None, False)[0]
    assert y[:3].isnan().all()
    assert y[3].isfinite().all()
