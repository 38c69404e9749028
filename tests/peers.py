"""Other libraries that pynn's models are compared with; a test that needs one skips with the reason when it is missing.

torchvision's wheel wants a CUDA build of torch for its own operators, which nothing here runs: beside a CPU build their
names are declared, so that its Python part can be imported. timm and transformers import torchvision when it is there,
and so do libraries that could do without it: make installs it outside of their sight, in DIRECTORY.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pynn

DIRECTORY = Path(sys.prefix) / "peers"


@functools.cache
def _prepare_torchvision() -> torch.library.Library | None:
    """Declares torchvision's operators when its library cannot be loaded; kept, since they go away with the object."""
    sys.path.append(str(DIRECTORY))
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = Path(spec.submodule_search_locations[0])
    try:
        for library in directory.glob("_C*.so"):
            torch.ops.load_library(library)
        torch.ops.torchvision.nms  # noqa: B018
        return None
    except (OSError, AttributeError):
        pass
    declared = torch.library.Library("torchvision", "DEF")
    source = (directory / "_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r'register_(?:meta\("|fake\("torchvision::)(\w+)', source))):
        declared.define(f"{name}(Tensor input) -> Tensor")
    return declared


def load(name: str):
    """The module of this name, or a skipped test."""
    _prepare_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} cannot be imported ({error}): make installs it")
    if name == "transformers":
        module.logging.set_verbosity_error()
        module.logging.disable_progress_bar()
    return module


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Random parameters and statistics everywhere, of a size that keeps activations near 1; none is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() > 1:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
                if name.endswith("Attention.q.weight"):  # T5 does not scale its scores: its queries are small instead
                    tensor.mul_(0.3)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(0.2 * noise)


def assert_close(a: torch.Tensor, b: torch.Tensor, what: str = "output", bound: float = 1e-5) -> None:
    """max |a - b| <= bound max |b|."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} and {tuple(b.shape)}"
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    assert size > 0, f"{what}: nothing but zeros"
    assert error <= bound * size, f"{what}: {error / size:.2e} of the largest value"


def assert_gradients_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    """As assert_close, tensor by tensor; a gradient that is zero but for rounding is held to the largest of all.

    The bias of attention's keys has such a gradient: softmax does not see it.
    """
    assert ours.keys() == theirs.keys()
    largest = max(tensor.abs().max().item() for tensor in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        error, size = (ours[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert error <= bound * size + 1e-6 * largest, f"{name}: {error / size:.2e} of the largest value"


def backward(output: torch.Tensor) -> None:
    """The gradients of a fixed combination of all outputs."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()


def losses(model: torch.nn.Module, loss_of, steps: int = 20, lr: float = 0.01) -> torch.Tensor:
    """The loss at every step of a short training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    found = []
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def assert_patch_is_faithful(model: torch.nn.Module, run, loss_of, wanted: set[str], lr: float = 0.01) -> None:
    """pynn.patch: same outputs, same training losses, its kernels run, and unpatch restores every bit."""
    model.eval()
    truth = run(model)
    expected = losses(copy.deepcopy(model).train(), loss_of, lr=lr)
    kinds = [type(module) for module in model.modules()]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    report = pynn.patch(model)
    with pynn.explain() as calls:
        assert_close(run(model), truth)
    assert wanted <= {call.op for call in calls}, str(report)
    found = losses(copy.deepcopy(model).train(), loss_of, lr=lr)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert expected[-1] < expected[0]
    pynn.unpatch(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(run(model), truth)
