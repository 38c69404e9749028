"""Diffusion ops against the usual eager formulas (coefficients already gathered, noise from torch.randn)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import pynn
from bench import _gpu
from bench.harness import Case, assert_agrees
from pynn.diffusion import Schedule

SHAPES = ((64, 1, 8, 8), (128, 3, 32, 32), (4, 3, 256, 256), (64, 3, 128, 128))
QUICK_SHAPES = ((64, 1, 8, 8), (4, 3, 256, 256))
GPU_SHAPES = ((64, 3, 256, 256), (128, 3, 32, 32), (512, 3, 256, 256))  # 12.6, 0.4 and 100.7 million elements
GPU_QUICK_SHAPES = ((128, 3, 32, 32),)
FIRST_TIMESTEP = 200  # from here on the noise is large enough to be measured in bfloat16 samples


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            yield from _Problem(shape, dtype, "cpu").cases()


def gpu_cases(quick: bool = False) -> Iterator[Case]:
    for shape in GPU_QUICK_SHAPES if quick else GPU_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            wanted = 100 * torch.Size(shape).numel()  # bytes: float64 references of several tensors
            if _gpu.fits(wanted):
                torch.compiler.reset()  # every case is compiled for its own shape
                yield from _Problem(shape, dtype, "cuda").cases()
            else:
                print(f"diffusion {shape} is left out: it takes up to {wanted / 1e9:.0f} GB of GPU memory")


def jump(x, signal, noise, z=None):
    return signal * x + noise * (torch.randn_like(x) if z is None else z)


def reverse(x, output, p, q, c, d, sigma, z=None):
    x0 = (p * x + q * output).clamp(-1, 1)
    return c * x0 + d * x + sigma * (torch.randn_like(x) if z is None else z)


def loss_of(output, x, signal, noise, z):
    return ((output - (signal * z - noise * x)) ** 2).mean()


def jump_and_loss(x, output, signal, noise):
    z = torch.randn_like(x)
    return jump(x, signal, noise, z), loss_of(output, x, signal, noise, z)


def assert_standard_normal(z: torch.Tensor, what: str) -> None:
    """The check of a provider that draws its own noise: its result minus the mean, over the standard deviation."""
    mean, std = z.double().mean().item(), z.double().std().item()
    if not (abs(mean) < 0.05 and abs(std - 1) < 0.05):
        raise AssertionError(f"{what}: the noise has mean {mean:.3f} and standard deviation {std:.3f}")


class _Problem:
    """One shape and dtype on one device: operands, coefficients in float64 and in the dtype, and the cases."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        self.device, self.dtype, self.shape = device, dtype, shape
        schedule = Schedule.cosine(1000)
        tables = schedule.forward_table, schedule.reverse_table("v"), schedule.loss_table("v")
        self.forward, self.reverse, self.loss_table = (table.to(device) for table in tables)
        self.x, self.output, self.z = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        self.leaf = self.output.detach().clone().requires_grad_()
        self.t = torch.randint(FIRST_TIMESTEP, 1000, shape[:1], device=device)
        self.seed = 1 if device == "cpu" else torch.tensor([1, 0], device=device)  # a graph cannot hold a host value
        before = self.forward[self.t]
        self.jump_columns = self._columns(self.forward[self.t + 1].sqrt())
        one_step = self.forward[self.t + 1, 0] / before[:, 0]
        self.step_columns = self._columns(torch.stack((one_step, 1 - one_step), 1).sqrt())
        self.reverse_columns = self._columns(self.reverse[self.t][:, :5])

    def _columns(self, table: torch.Tensor) -> list[torch.Tensor]:
        return [values.view(-1, *[1] * (len(self.shape) - 1)) for values in table.unbind(1)]

    def _in_dtype(self, columns: list[torch.Tensor]) -> list[torch.Tensor]:
        return [column.to(self.dtype) for column in columns]

    def _wide(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.detach().double() for tensor in tensors]

    @functools.cached_property
    def backends(self) -> list[str]:
        return ["cpu"] if self.device == "cpu" else _gpu.backends_with("forward_jump_fwd")

    def providers(self, ours: Callable, eager: Callable, compiled: Callable) -> dict[str, Callable[[], object]]:
        if self.device == "cpu":
            return {"pynn": ours, "torch": eager}
        fused = {f"pynn {name}": functools.partial(_gpu.on, name, ours) for name in self.backends}
        return {**fused, "torch": eager, "torch compile": compiled}

    def check_ours(self, ours: Callable[[], torch.Tensor], reference: torch.Tensor, what: str) -> None:
        for name in self.backends:
            assert_agrees(_gpu.on(name, ours), reference, self.dtype, f"{what}, {name}")

    def case(self, op: str, mode: str, tensors: int, providers, check: Callable[[], None]) -> Case:
        """tensors: how many of x's size the op has to read or write."""
        return Case(
            op,
            "x".join(map(str, self.shape)),
            str(self.dtype).removeprefix("torch."),
            mode,
            providers,
            check,
            bytes=tensors * self.x.numel() * self.x.element_size(),
            device=self.device,
        )

    def cases(self) -> Iterator[Case]:
        yield self.jump_case("forward_jump", pynn.ops.forward_jump, self.jump_columns)
        if self.device == "cuda":
            yield self.jump_case("forward_step", pynn.ops.forward_step, self.step_columns)
        yield self.reverse_case()
        if self.device == "cuda":
            yield self.loss_case("forward")
        yield self.loss_case("forward+backward")
        if self.device == "cpu":
            yield self.pair_case()

    def jump_case(self, name: str, op: Callable, columns: list[torch.Tensor]) -> Case:
        x, t, z = self.x, self.t, self.z
        signal, noise = self._in_dtype(columns)
        compiled = torch.compile(jump, dynamic=False)

        def check():
            truth = jump(*self._wide(x), *columns, *self._wide(z))
            self.check_ours(lambda: op(x, t, self.forward, noise=z), truth, name)
            assert_agrees(jump(x, signal, noise, z), truth, torch.bfloat16, f"{name}, torch")
            if self.device == "cuda":
                mean = columns[0] * self._wide(x)[0]
                assert_standard_normal((compiled(x, signal, noise) - mean) / columns[1], f"{name}, torch compile")

        providers = self.providers(
            lambda: op(x, t, self.forward, seed=self.seed),
            lambda: jump(x, signal, noise),
            lambda: compiled(x, signal, noise),
        )
        return self.case(name, "forward", 2, providers, check)

    def reverse_case(self) -> Case:
        x, t, output, z, table = self.x, self.t, self.output, self.z, self.reverse
        coefficients = self._in_dtype(self.reverse_columns)
        compiled = torch.compile(reverse, dynamic=False)

        def check():
            wide = self._wide(x, output)
            truth = reverse(*wide, *self.reverse_columns, *self._wide(z))
            ours = functools.partial(pynn.ops.reverse_step, x, t, output, table, clip=1.0, noise=z)
            self.check_ours(ours, truth, "reverse_step")
            assert_agrees(reverse(x, output, *coefficients, z), truth, torch.bfloat16, "reverse_step, torch")
            if self.device == "cuda":
                mean = reverse(*wide, *self.reverse_columns, torch.zeros_like(truth))
                drawn = (compiled(x, output, *coefficients) - mean) / self.reverse_columns[-1]
                assert_standard_normal(drawn, "reverse_step, torch compile")

        providers = self.providers(
            lambda: pynn.ops.reverse_step(x, t, output, table, clip=1.0, seed=self.seed),
            lambda: reverse(x, output, *coefficients),
            lambda: compiled(x, output, *coefficients),
        )
        return self.case("reverse_step", "forward", 3, providers, check)

    def loss_case(self, mode: str) -> Case:
        """torch is given the noise it drew for the jump; pynn makes it again."""
        x, t, z, table = self.x, self.t, self.z, self.loss_table
        signal, noise = self._in_dtype(self.jump_columns)
        backward = mode == "forward+backward"
        output = self.leaf if backward else self.output
        compiled = torch.compile(loss_of, dynamic=False)

        def finished(loss: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(loss, self.leaf)[0] if backward else loss

        def check():
            wide = self._wide(output)[0].requires_grad_(backward)
            loss = loss_of(wide, *self._wide(x), *self.jump_columns, *self._wide(z))
            truth = torch.autograd.grad(loss, wide)[0] if backward else loss
            ours = functools.partial(pynn.ops.diffusion_loss, output, x, t, table, noise=z)
            self.check_ours(lambda: finished(ours().mean()), truth, f"diffusion_loss {mode}")
            for name, formula in (("torch", loss_of), ("torch compile", compiled)):
                if name == "torch" or self.device == "cuda":
                    got = finished(formula(output, x, signal, noise, z))
                    assert_agrees(got, truth, torch.bfloat16, f"diffusion_loss {mode}, {name}")

        providers = self.providers(
            lambda: finished(pynn.ops.diffusion_loss(output, x, t, table, seed=self.seed).mean()),
            lambda: finished(loss_of(output, x, signal, noise, z)),
            lambda: finished(compiled(output, x, signal, noise, z)),
        )
        return self.case("diffusion_loss", mode, 5 if backward else 2, providers, check)

    def pair_case(self) -> Case:
        """All that a training step does around the model; torch draws the noise once and keeps it."""
        x, t, leaf = self.x, self.t, self.leaf
        signal, noise = self._in_dtype(self.jump_columns)

        def fused():
            pynn.ops.forward_jump(x, t, self.forward, seed=self.seed)
            loss = pynn.ops.diffusion_loss(leaf, x, t, self.loss_table, seed=self.seed).mean()
            return torch.autograd.grad(loss, leaf)[0]

        def eager():
            return torch.autograd.grad(jump_and_loss(x, leaf, signal, noise)[1], leaf)[0]

        def check():
            z = pynn.ops.normal(self.shape, seed=self.seed, dtype=self.dtype)
            wide = self._wide(leaf)[0].requires_grad_()
            loss = loss_of(wide, *self._wide(x), *self.jump_columns, *self._wide(z))
            assert_agrees(fused(), torch.autograd.grad(loss, wide)[0], self.dtype, "forward_jump + diffusion_loss")

        providers = {"pynn": fused, "torch": eager}
        return self.case("forward_jump + diffusion_loss", "forward+backward", 7, providers, check)
