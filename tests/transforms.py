"""An op under everything PyTorch does to functions. Each check compares with plain eager autograd."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint


def _close(a, b, what):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if a.dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(a, b, msg=lambda m: f"{what}: {m}", **tolerance)


def _gradients(fn, args):
    leaves = [a.detach().requires_grad_() for a in args]
    output = fn(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    return output.detach(), torch.autograd.grad((output * weight).sum(), leaves)


def assert_compiles(fn, *args, backend: str = "aot_eager") -> None:
    """torch.compile(fullgraph=True): same output and gradients. fn takes floating tensors only."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    _compare(_gradients(fn, args), _gradients(compiled, args), f"compile({backend})")
    with torch.no_grad():
        _close(compiled(*args), fn(*args), f"compile({backend}) without grad")
    torch._dynamo.reset()


def assert_checkpoints(fn, *args) -> None:
    """Activation checkpointing (non-reentrant)."""
    _compare(_gradients(fn, args), _gradients(lambda *a: checkpoint(fn, *a, use_reentrant=False), args), "checkpoint")


def _compare(expected, got, what):
    _close(got[0], expected[0], f"{what} output")
    for i, (a, b) in enumerate(zip(got[1], expected[1], strict=True)):
        _close(a, b, f"{what} gradient {i}")


def assert_exports(fn, *args) -> None:
    """torch.export gives the same output, and the graph holds a pynn op."""

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return fn(*inputs)

    program = torch.export.export(Module(), args)
    _close(program.module()(*args), fn(*args), "export")
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(target.startswith("pynn") for target in targets), f"export: no pynn op in {targets}"


def assert_func_grad(fn, *args) -> None:
    """torch.func.grad of the first argument, alone and under vmap over a stack of it."""

    def scalar(x):
        output = fn(x, *args[1:])
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        return (output * weight.view(output.shape)).sum()

    def eager(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(scalar(leaf), leaf)[0]

    _close(torch.func.grad(scalar)(args[0]), eager(args[0]), "func.grad")
    stack = torch.stack((args[0], 2 * args[0], -args[0]))
    _close(torch.vmap(torch.func.grad(scalar))(stack), torch.stack([eager(x) for x in stack]), "vmap(func.grad)")


def assert_vmaps(fn, *args) -> None:
    """vmap over each argument in turn, over all of them, and from another dimension."""
    for i, arg in enumerate(args):
        stack = torch.stack((arg, arg * 2, arg * -1))
        dims = tuple(0 if j == i else None for j in range(len(args)))
        expected = torch.stack([fn(*(s if j == i else a for j, a in enumerate(args))) for s in stack])
        _close(
            torch.vmap(fn, in_dims=dims)(*(stack if j == i else a for j, a in enumerate(args))), expected, f"vmap {i}"
        )
        moved = stack.movedim(0, -1)
        dims = tuple(-1 if j == i else None for j in range(len(args)))
        got = torch.vmap(fn, in_dims=dims)(*(moved if j == i else a for j, a in enumerate(args)))
        _close(got, expected, f"vmap {i} from the last dimension")
    stacks = tuple(torch.stack((a, a * 2)) for a in args)
    expected = torch.stack([fn(*(s[k] for s in stacks)) for k in range(2)])
    _close(torch.vmap(fn)(*stacks), expected, "vmap of all arguments")


def assert_all(fn, *args, vmap: bool = True) -> None:
    """Every check of this file on one function of floating tensors."""
    assert_compiles(fn, *args)
    assert_exports(fn, *args)
    assert_checkpoints(fn, *args)
    assert_func_grad(fn, *args)
    if vmap:
        assert_vmaps(fn, *args)
