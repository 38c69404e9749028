"""Ops captured in a CUDA graph: a replay on new data, timesteps and keys equals the eager call, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from policy import assert_bitwise

import pynn
from pynn.diffusion import Schedule

T, SHAPE = 20, (6, 3, 9, 7)


def operands(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = "x", "output", "variance", "noise"
    made = {name: torch.randn(SHAPE, generator=generator).to(dtype).to("cuda") for name in names}
    made["variance"].clamp_(-1, 1)
    made["weight"], made["bias"] = torch.randn((2, SHAPE[1]), generator=generator).to(dtype).to("cuda").unbind()
    made["t"] = torch.randint(1, T, SHAPE[:1], generator=generator).to("cuda")
    made["key"] = torch.randint(2**62, (2,), generator=generator).to("cuda")
    made["keys"] = torch.randint(2**62, (SHAPE[0], 2), generator=generator).to("cuda")
    return made


def gradients(y: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


def calls() -> dict[str, Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]]:
    schedule = Schedule.cosine(T)
    forward, loss_table = schedule.forward_table.cuda(), schedule.loss_table("v").cuda()
    table, learned = (schedule.reverse_table("v", kind).cuda() for kind in ("fixed_small", "learned_range"))
    ops = pynn.ops

    def jump(o):
        x, noise = (o[name].detach().requires_grad_() for name in ("x", "noise"))
        y = ops.forward_jump(x, o["t"], forward, noise=noise)
        return y, *gradients(y, x, noise)

    def reverse(o):
        x, output, v = (o[name].detach().requires_grad_() for name in ("x", "output", "variance"))
        y = ops.reverse_step(x, o["t"], output, learned, variance=v, clip=1.0, seed=o["keys"])
        return y, *gradients(y, x, output, v)

    def loss(o):
        output, x0 = (o[name].detach().requires_grad_() for name in ("output", "x"))
        value = ops.diffusion_loss(output, x0, o["t"], loss_table, seed=o["key"])
        return value, *gradients(value, output, x0)

    def group_norm(o):
        leaves = [o[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
        y = ops.group_norm(leaves[0], 3, *leaves[1:], activation="silu")
        return y, *torch.autograd.grad(y, leaves, o["noise"])

    def conv2d(o):
        x, bias = (o[name].detach().requires_grad_() for name in ("x", "bias"))
        channels = x.shape[1]
        weight = o["weight"].detach().repeat(channels, 9).view(channels, channels, 3, 3).requires_grad_()
        y = ops.conv2d(x, weight, bias, padding=1, activation="silu", residual=o["output"])
        return y, *torch.autograd.grad(y, [x, weight, bias], o["noise"])

    def lstm(o):
        hidden, x = 8, o["x"].detach().reshape(6, 27, 7).requires_grad_()
        weight_ih, weight_hh = (
            o[name].detach().flatten()[: 4 * hidden * width].view(4 * hidden, width).requires_grad_()
            for name, width in (("variance", 7), ("noise", hidden))
        )
        y, (h, c) = ops.lstm(x, None, weight_ih, weight_hh, lengths=o["t"].repeat(5)[:27])
        leaves = [x, weight_ih, weight_hh]
        return y, h, c, *torch.autograd.grad([y, c], leaves, [torch.ones_like(y), torch.ones_like(c)])

    return {
        "normal": lambda o: (pynn.backends.op("normal", o["x"])(o["x"], o["keys"]),),
        "forward_jump": lambda o: ops.forward_jump(o["x"], o["t"], forward, seed=o["key"], return_noise=True),
        "forward_jump_backward": jump,
        "forward_step": lambda o: (ops.forward_step(o["x"], o["t"], forward, seed=o["keys"]),),
        "reverse_step": lambda o: ops.reverse_step(
            o["x"], o["t"], o["output"], table, clip=1.0, seed=o["key"], return_x0=True
        ),
        "reverse_step_backward": reverse,
        "diffusion_loss_backward": loss,
        "group_norm_backward": group_norm,
        "conv2d_backward": conv2d,
        "lstm_backward": lstm,
    }


NAMES = (
    "normal",
    "forward_jump",
    "forward_jump_backward",
    "forward_step",
    "reverse_step",
    "reverse_step_backward",
    "diffusion_loss_backward",
    "group_norm_backward",
    "conv2d_backward",
    "lstm_backward",
)
KERNELS = {"group_norm_backward": "group_norm_fwd", "conv2d_backward": "conv2d_fwd", "lstm_backward": "lstm_fwd"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_replay_equals_eager(backend, name, dtype):
    if reason := pynn.backends.why_not(KERNELS.get(name, "forward_jump_fwd"), backend):
        pytest.skip(f"{backend}: {reason}")
    with pynn.backend(backend):
        assert_replay_equals_eager(calls()[name], dtype)


def assert_replay_equals_eager(call, dtype):
    captured_on, fresh = operands(dtype, seed=0), operands(dtype, seed=1)
    expected = [tensor.detach().clone() for tensor in call(fresh)]

    side = torch.cuda.Stream()  # a warm-up on another stream, as torch asks for before a capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(captured_on)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [tensor.detach() for tensor in call(captured_on)]

    for operand, value in captured_on.items():
        value.copy_(fresh[operand])
    for round_number in range(2):
        for tensor in results:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert_bitwise(got, want, f"replay {round_number}")
