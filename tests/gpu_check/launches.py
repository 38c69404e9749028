"""Every op that has GPU kernels, once per dtype on small odd shapes, against the CPU kernels: bit for bit where the
kernels promise it.

    python -m gpu_check.launches [--poison] [--workers N] [--every N] backend ...

It is the self-check of `make gpu`, and the program that compute-sanitizer watches: so it is short, and compares on the
CPU. With --workers every case has a process of its own, which compiles its Triton kernels and may hang or crash without
the others; with --every it is a sample of the cases.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

import sample
import torch

import pynn
from gpu_check.plugin import is_broken
from pynn.diffusion import Schedule

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 5, 7), (4, 2, 32), (2, 4099))  # rows that start inside a quad, whole vectors, rows of several blocks
GROUP_NORM_SHAPES = ((3, 6, 5, 7), (2, 64, 9, 3), (1, 2, 131, 130))  # the last is too large for registers
# (image, weight, geometry): tensor cores, tails of tiles, stride phases, few channels, groups, depthwise, borders.
CONVOLUTIONS = (
    ((2, 32, 9, 9), (64, 32, 3, 3), {"padding": 1}),
    ((2, 19, 8, 7), (21, 19, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 64, 6, 6), (72, 64, 1, 1), {}),
    ((2, 3, 17, 17), (24, 3, 5, 5), {"padding": 2, "stride": 2}),
    ((2, 32, 9, 8), (3, 32, 3, 3), {"padding": 1}),
    ((2, 32, 7, 7), (32, 8, 3, 3), {"padding": 1, "groups": 4}),
    ((2, 24, 9, 11), (24, 1, 5, 5), {"padding": 2, "groups": 24}),
    ((2, 16, 9, 8), (16, 16, 3, 3), {"padding": 2, "dilation": 2, "padding_mode": "reflect"}),
)
# (cell, (steps, batch, input, hidden), options): one block per 16 rows, clusters, with weights in registers, processors
# that wait for each other, a launch per step for few rows and for many, a projection.
RECURRENT = (
    ("lstm", (5, 18, 6, 40), {}),
    ("gru", (4, 3, 5, 19), {"reverse": True}),
    ("rnn", (4, 5, 3, 65), {"nonlinearity": "relu"}),
    ("lstm", (4, 35, 9, 264), {"reverse": True}),
    ("gru", (4, 17, 9, 264), {}),
    ("rnn", (3, 18, 8, 530), {}),
    ("lstm", (3, 18, 5, 512), {}),
    ("gru", (3, 5, 4, 704), {}),
    ("lstm", (1, 70, 4, 31), {}),
    ("lstm", (3, 5, 7, 24), {"projection": 9}),
)
TEAMS = (3, 4, 5, 6, 7)  # those of RECURRENT whose programs wait for each other in Triton
# ((batch, heads, key heads, queries, keys, dim, value dim), shape of a float mask or None, options): both widths of
# tiles and beyond them, tails, shared heads, the diagonal, dropout, masks of every score, shared by rows, by heads; a
# window with a soft cap, ALiBi and sinks, whose gradients are taken too; few queries over parts of the keys.
ATTENTION = (
    ((2, 4, 2, 70, 66, 64, 64), None, {}),
    ((1, 2, 1, 65, 65, 128, 80), None, {"is_causal": True}),
    ((1, 2, 1, 150, 140, 128, 128), None, {"is_causal": True}),
    ((1, 2, 2, 37, 530, 40, 24), (1, 2, 37, 530), {}),
    ((1, 2, 2, 33, 41, 256, 136), (1, 41), {"dropout_p": 0.25, "seed": 5}),
    ((2, 2, 1, 19, 23, 16, 8), (2, 1, 1, 23), {}),
    ((1, 4, 2, 70, 130, 64, 64), None, {"window": (40, 5), "alignment": "lower_right", "softcap": 2, "per_head": True}),
    ((2, 20, 2, 2, 1030, 64, 64), None, {}),
    ((1, 4, 2, 3, 700, 128, 136), (1, 4, 3, 700), {"window": (500, 0), "alignment": "lower_right", "per_head": True}),
)
GLUON_ATTENTION = (0, 2)  # those of ATTENTION that the Gluon kernel covers
# (op, (batch, heads, queries, keys, dim, value dim), shape of a float mask or None, options): keys of windows with and
# without a copy of them, rows that begin anywhere.
SCORERS = (
    ("additive_attention", (2, 2, 9, 33, 19, 7), None, {}),
    ("additive_attention", (1, 2, 1, 140, 64, 40), (2, 1, 140), {"return_weights": True}),
    ("cosine_attention", (2, 2, 19, 70, 32, 24), (19, 70), {}),
    ("local_attention", (1, 2, 37, 80, 64, 16), (1, 80), {"width": 4.5}),
    ("local_attention", (3, 1, 1, 300, 16, 16), None, {"width": 20}),
    ("hard_attention", (2, 2, 17, 45, 16, 24), (17, 45), {}),
)
# (parents, input, hidden): a chain, a star, a forest of two.
TREES = (((1, 2, 3, -1), 5, 19), ((8,) * 8 + (-1,), 33, 64), ((2, 2, 6, 5, 5, 6, -1, 8, -1), 7, 130))
# Where another order of summation or another libm is allowed: result -> difference relative to the largest element.
SUMMED = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Differences go from step to step.
REPEATED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
TOLERANCE = {
    "loss": SUMMED,
    "learned range": {torch.float64: 1e-12},
    "group norm": SUMMED,
    "group norm channels last": SUMMED,
    "convolution": SUMMED,
    "convolution channels last": SUMMED,
    "transposed convolution": SUMMED,
    "recurrent": REPEATED,
    "tree": REPEATED,
    "attention": SUMMED,
    "scorer": SUMMED,
}

CASE_LIMIT_S = 110.0  # of a case in a process of its own

Results = dict[str, torch.Tensor]
Run = Callable[[str, torch.dtype], Results]  # (device, dtype) -> results on the CPU


def _operands(device: str, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(count)]


def _gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


def diffusion(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Results:
    """Noise by one key, by a key per sample, and given; one timestep and one per sample; gradients of everything."""
    schedule = Schedule.cosine(20)
    forward, loss_table = schedule.forward_table.to(device), schedule.loss_table("v").to(device)
    table, learned = (schedule.reverse_table("v", kind).to(device) for kind in ("fixed_small", "learned_range"))
    x, output, v, noise = _operands(device, dtype, shape, 4)
    v = v.clamp(-1, 1)
    batch = shape[0]
    t = (torch.arange(batch) * 6).to(device)
    keys = torch.stack((torch.arange(batch) + 5, torch.arange(batch)), 1).to(device)
    x, output, v, noise = (tensor.requires_grad_() for tensor in (x, output, v, noise))
    one, own = {"seed": 3}, {"seed": keys}
    results = {"normal": pynn.ops.normal(shape, seed=3, dtype=dtype, device=device)}
    results["jump"], results["jump noise"] = pynn.ops.forward_jump(x, t, forward, **one, return_noise=True)
    results["step"] = pynn.ops.forward_step(x, t, forward, **own)
    given = pynn.ops.forward_jump(x, 9, forward, noise=noise)
    results["jump gradient"], results["noise gradient"] = _gradients(given, [x, noise])
    results["reverse"], results["x0"] = pynn.ops.reverse_step(x, t, output, table, clip=1.0, **one, return_x0=True)
    results["reverse gradient"] = _gradients(results["reverse"], [x, output])[1]
    free = pynn.ops.reverse_step(x, 4, output, learned, variance=v, **own)
    results["learned range"] = free
    results["learned range gradient"] = _gradients(free, [v])[0]
    results["loss"] = pynn.ops.diffusion_loss(output, x, t, loss_table, **one)
    results["loss gradient"], results["x0 gradient"] = _gradients(results["loss"], [output, x])
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def group_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Results:
    """With SiLU, and its gradients, in both memory formats."""
    x, dy = _operands(device, dtype, shape, 2)
    weight, bias = _operands(device, dtype, shape[1:2], 2)
    results = {}
    formats = {"group norm": torch.contiguous_format, "group norm channels last": torch.channels_last}
    for name, memory_format in formats.items():
        leaves = [x.to(memory_format=memory_format).detach().requires_grad_()]
        leaves += [tensor.detach().requires_grad_() for tensor in (weight, bias)]
        y = pynn.ops.group_norm(leaves[0], 2, *leaves[1:], activation="silu")
        gradients = torch.autograd.grad(y, leaves, dy)
        results[name] = y
        results |= {f"{name} gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def convolution(device: str, dtype: torch.dtype, number: int) -> Results:
    """With bias, residual and SiLU, and its gradients, in both memory formats; transposed with the same weight."""
    shape, weight_shape, geometry = CONVOLUTIONS[number]
    x, weight = _operands(device, dtype, shape, 1)[0], _operands(device, dtype, weight_shape, 1)[0]
    bias = _operands(device, dtype, weight_shape[:1], 1)[0]
    residual = _operands(device, dtype, (weight_shape[0], 1, 1), 1)[0]
    results = {}
    formats = {"convolution": torch.contiguous_format, "convolution channels last": torch.channels_last}
    for name, memory_format in formats.items():
        leaves = [t.detach().requires_grad_() for t in (x.to(memory_format=memory_format), weight, bias, residual)]
        y = pynn.ops.conv2d(*leaves[:3], **geometry, activation="silu", residual=leaves[3])
        results[name] = y
        results |= {f"{name} gradient {i}": gradient for i, gradient in enumerate(_gradients(y, leaves))}
        scale, shift = weight.new_full(shape[1:2], 0.5), weight.new_full(shape[1:2], 0.25)
        prologue = {"input_scale": scale, "input_shift": shift, "input_activation": "silu"}
        results[f"{name} of silu"] = pynn.ops.conv2d(*leaves[:3], **geometry, **prologue)
    back = {name: value for name, value in geometry.items() if name != "padding_mode"}
    results["transposed convolution"] = pynn.ops.conv_transpose2d(y.detach(), weight, **back, activation="relu")
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def recurrent(device: str, dtype: torch.dtype, number: int) -> Results:
    """A layer whose rows have lengths of their own, from given states, and all its gradients."""
    cell, (steps, batch, size, hidden), options = RECURRENT[number]
    options = dict(options)
    gates, state = {"lstm": 4, "gru": 3, "rnn": 1}[cell], options.pop("projection", hidden)
    generator = torch.Generator().manual_seed(7)

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(dtype).to(device).requires_grad_()

    x, hx = leaf(steps, batch, size), [leaf(batch, state)]
    weights = [leaf(gates * hidden, size, scale=size**-0.5), leaf(gates * hidden, state, scale=hidden**-0.5)]
    weights += [leaf(gates * hidden) for _ in range(2)]
    if cell == "lstm":
        hx.append(leaf(batch, hidden))
    if state != hidden:
        weights.append(leaf(state, hidden, scale=hidden**-0.5))
    lengths = (torch.arange(batch) * 5 % (steps + 1)).to(device)
    grad = leaf(steps, batch, state).detach()
    states = tuple(hx) if cell == "lstm" else hx[0]
    output, last = getattr(pynn.ops, cell)(x, states, *weights, lengths=lengths, **options)
    last = last if cell == "lstm" else (last,)
    leaves = [x, *hx, *weights]
    gradients = torch.autograd.grad([output, *last], leaves, [grad, *map(torch.ones_like, last)])
    results = {"recurrent": output} | {f"recurrent gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def team(device: str, dtype: torch.dtype, number: int) -> Results:
    """The same, and whether each result has the bits of a launch per step."""
    from pynn.triton_kernels import recurrent_configs as configs

    results = recurrent(device, dtype, number)
    with configs.without_teams():
        step_by_step = recurrent(device, dtype, number)
    same = torch.tensor([torch.equal(results[name], step_by_step[name]) for name in results])
    return results | {"same as step by step": same}


def attention(device: str, dtype: torch.dtype, number: int) -> Results:
    """Grouped heads, stored as (B, L, H, D), and all gradients, that of the mask among them."""
    (batch, heads, key_heads, queries, keys, dim, value_dim), mask_shape, options = ATTENTION[number]
    shapes = ((batch, queries, heads, dim), (batch, keys, key_heads, dim), (batch, keys, key_heads, value_dim))
    generator = torch.Generator().manual_seed(7)

    def leaf(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_()

    leaves = [leaf(shape) for shape in shapes]
    mask = None if mask_shape is None else leaf(mask_shape)
    heads_first = [t.transpose(1, 2) for t in leaves]
    options = dict(options)
    if options.pop("per_head", False):
        leaves.append(torch.linspace(-1, 1, heads, device=device, requires_grad=True))
        options |= {"sinks": leaves[-1], "alibi_slopes": torch.linspace(0, 0.5, heads, device=device)}
    out = pynn.ops.scaled_dot_product_attention(*heads_first, mask, enable_gqa=True, **options)
    leaves += [] if mask is None else [mask]
    gradients = torch.autograd.grad(out, leaves, leaf(out.shape).detach())
    results = {"attention": out} | {f"attention gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def scorer(device: str, dtype: torch.dtype, number: int) -> Results:
    """An attention with scores of its own, and all its gradients. Products of whole numbers have no ties that rounding
    decides, so hard attention takes the same keys everywhere."""
    name, (batch, heads, queries, keys, dim, value_dim), mask_shape, options = SCORERS[number]
    generator = torch.Generator().manual_seed(7)

    def leaf(*shape: int) -> torch.Tensor:
        values = torch.randint(-2, 3, shape, generator=generator) / 2
        return values.to(dtype).to(device).requires_grad_()

    leaves = [leaf(batch, heads, rows, width) for rows, width in ((queries, dim), (keys, dim), (keys, value_dim))]
    options = dict(options)
    if name == "additive_attention":
        leaves.append(leaf(dim))
    elif name == "local_attention":
        leaves.append((torch.rand(batch, heads, queries, generator=generator) * keys).to(device).requires_grad_())
    elif name == "cosine_attention":
        options["temperature"] = torch.full((heads, 1, 1), 5.0, device=device, requires_grad=True)
    if mask_shape is not None:
        leaves.append(leaf(*mask_shape))
    out = getattr(pynn.ops, name)(*leaves, **options)  # the mask comes last everywhere
    leaves += [t for t in options.values() if isinstance(t, torch.Tensor)]
    outs = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(outs, leaves, [leaf(*t.shape).detach() for t in outs])
    results = {"scorer": outs[0]} | {f"scorer gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def gluon_attention(device: str, dtype: torch.dtype, number: int) -> Results:
    """Where the Triton backend has the choice, with the Gluon kernel."""
    from pynn.triton_kernels import scaled_dot_product_attention_configs as configs

    with configs.with_gluon():
        return attention(device, dtype, number)


def tree(device: str, dtype: torch.dtype, number: int) -> Results:
    """A forest, and all its gradients."""
    parents, size, hidden = TREES[number]
    forest = pynn.ops.Forest.from_parents(torch.tensor(parents, device=device))
    shapes = ((len(parents), size), (4 * hidden, size), (4 * hidden, hidden), (4 * hidden,))
    x, *weights = (_operands(device, dtype, shape, 1)[0] for shape in shapes)
    leaves = [t.requires_grad_() for t in (x, *(w * hidden**-0.5 for w in weights))]
    h, c = pynn.ops.tree_lstm(leaves[0], forest, *leaves[1:])
    gradients = torch.autograd.grad([h, c], leaves, [torch.ones_like(h), torch.ones_like(c)])
    results = {"tree": h} | {f"tree gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: str  # a dispatcher op: backends without it leave the case out
    run: Run
    alone: bool = False  # in a process of its own only: threads that wait for each other have not been seen on a GPU


CASES = {f"diffusion {shape}": Case("forward_jump_fwd", functools.partial(diffusion, shape=shape)) for shape in SHAPES}
CASES |= {
    f"group_norm {shape}": Case("group_norm_fwd", functools.partial(group_norm, shape=shape))
    for shape in GROUP_NORM_SHAPES
}
CASES |= {
    f"conv2d {shape} {weight}": Case("conv2d_fwd", functools.partial(convolution, number=number))
    for number, (shape, weight, _) in enumerate(CONVOLUTIONS)
}
CASES |= {
    f"{cell} {shape}": Case(f"{cell}_fwd", functools.partial(recurrent, number=number))
    for number, (cell, shape, _) in enumerate(RECURRENT)
}
CASES |= {
    f"{RECURRENT[number][0]} {RECURRENT[number][1]} team": Case(
        f"{RECURRENT[number][0]}_fwd", functools.partial(team, number=number)
    )
    for number in TEAMS
}
CASES |= {
    f"tree_lstm {parents} {hidden}": Case("tree_lstm_fwd", functools.partial(tree, number=number))
    for number, (parents, _, hidden) in enumerate(TREES)
}
CASES |= {
    f"scaled_dot_product_attention {shape}": Case(
        "scaled_dot_product_attention_fwd", functools.partial(attention, number=number)
    )
    for number, (shape, _, _) in enumerate(ATTENTION)
}
CASES |= {
    f"{name} {shape}": Case(
        "additive_attention_fwd" if name == "additive_attention" else "scaled_dot_product_attention_fwd",
        functools.partial(scorer, number=number),
    )
    for number, (name, shape, _, _) in enumerate(SCORERS)
}
CASES |= {
    f"scaled_dot_product_attention {ATTENTION[number][0]} Gluon": Case(
        "scaled_dot_product_attention_fwd", functools.partial(gluon_attention, number=number), alone=True
    )
    for number in GLUON_ATTENTION
}


def difference(got: torch.Tensor, expected: torch.Tensor, allowed: float) -> str:
    """'' or what is wrong."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    wrong = ~((got == expected) | (got.isnan() & expected.isnan()))
    if allowed:
        wrong = ~((got.double() - expected.double()).abs() <= allowed * expected.double().abs().max())
    if not wrong.any():
        return ""
    first = int(wrong.flatten().nonzero()[0])
    pair = got.flatten()[first].item(), expected.flatten()[first].item()
    return f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first at {first}: {pair[0]!r}, CPU {pair[1]!r}"


def compare(backend: str, case: Case, dtype: torch.dtype) -> tuple[list[str], int]:
    """(what differs from the CPU kernels, number of comparisons); a case that raises is one comparison."""
    try:
        with pynn.backend("cpu"):
            expected = case.run("cpu", dtype)
        with pynn.backend(backend):
            got = case.run(pynn.backends.device_of(backend), dtype)
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        return [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"], 1
    problems = []
    for name, tensor in got.items():
        allowed = TOLERANCE.get(name.partition(" gradient")[0], {}).get(dtype, 0.0)
        if problem := difference(tensor, expected[name], allowed):
            problems.append(f"{name}: {problem}")
    return problems, len(got)


def run_case(backend: str, name: str, every: int) -> tuple[list[str], int]:
    """(problems, number of comparisons) of a case in the dtypes of the sample."""
    problems, compared = [], 0
    for dtype in DTYPES:
        if sample.chosen(f"{name} {dtype}", every):
            found, count = compare(backend, CASES[name], dtype)
            problems += [f"{backend}: {name} {dtype}, {problem}" for problem in found]
            compared += count
    return problems, compared


def run_process(backend: str, name: str, options: list[str]) -> tuple[list[str], int]:
    """The same, by a process of its own."""
    command = [sys.executable, "-m", "gpu_check.launches", *options, "--only", name, "--", backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return [f"{backend}: {name}, not done after {CASE_LIMIT_S:.0f} s"], 1
    if done.returncode == 0 and (agree := re.search(r"all (\d+) comparisons agree", done.stdout)):
        return [], int(agree[1])
    print(done.stdout + done.stderr[-4000:], flush=True)
    problems = [line for line in done.stdout.splitlines() if line.startswith(f"{backend}: {name} torch.")]
    return problems or [f"{backend}: {name}, ended with status {done.returncode}"], 1


Outcome = tuple[str, str, list[str], int]  # backend, name, problems, number of comparisons


def in_this_process(cases: Iterable[tuple[str, str]], every: int) -> Iterator[Outcome]:
    for backend, name in cases:
        yield backend, name, *run_case(backend, name, every)
        if is_broken():
            yield backend, name, [f"{backend}: {name} has broken the GPU for this process, the rest is left out"], 0
            return


def in_processes(cases: Iterable[tuple[str, str]], options: argparse.Namespace) -> Iterator[Outcome]:
    passed_on = ["--every", str(options.every), *(["--poison"] if options.poison else [])]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        running = {pool.submit(run_process, *case, passed_on): case for case in cases}
        for ended in concurrent.futures.as_completed(running):
            yield *running[ended], *ended.result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poison", action="store_true", help="results start as NaN, so that an unwritten one shows")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="every case in a process, so many at a time"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in so many cases and dtypes")
    parser.add_argument("--only", action="append", metavar="CASE", help="run this case (repeatable)")
    parser.add_argument("backends", nargs="+", metavar="backend")
    options = parser.parse_args(arguments)
    # Fills what torch.empty returns; torch's ops around the kernels may be those that have no deterministic form.
    torch.use_deterministic_algorithms(options.poison, warn_only=True)
    problems, compared, cases = [], 0, []
    for backend in options.backends:
        alone = options.workers or options.only
        wanted = [name for name in CASES if (name in options.only if options.only else alone or not CASES[name].alone)]
        found = [name for name in wanted if pynn.backends.has_kernel(CASES[name].kernel, backend)]
        cases += [(backend, name) for name in found]
        if not found:
            problems.append(f"{backend}: no kernels ({pynn.backends.unavailable.get(backend, 'no such backend')})")
    for backend, name, wrong, count in (
        in_processes(cases, options) if options.workers else in_this_process(cases, options.every)
    ):
        print("\n".join(wrong) if wrong else f"{backend}: {name} agrees", flush=True)
        problems += wrong
        compared += count
    torch.use_deterministic_algorithms(False)
    where = ", ".join(options.backends)
    summary = f"{len(problems)} problems" if problems else f"all {compared} comparisons agree"
    print("\n".join(["", *problems, f"{summary} on {where}"]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
