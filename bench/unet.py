"""A training step of the demo UNet on 8x8 digits, against its twin built from torch layers in both memory formats."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import Case, assert_agrees
from pynn.models.unet import PYNN_LAYERS, TORCH_LAYERS, UNet

DIGITS = {"in_channels": 1, "channels": 24, "time_dim": 48, "num_classes": 10}
BATCH = 64


def cases(quick: bool = False) -> Iterator[Case]:
    models = {
        "pynn": _model(PYNN_LAYERS, torch.channels_last),
        "torch": _model(TORCH_LAYERS, torch.channels_last),
        "torch contiguous": _model(TORCH_LAYERS, torch.contiguous_format),
    }
    x, noise = torch.randn(BATCH, 1, 8, 8), torch.randn(BATCH, 1, 8, 8)
    t, labels = torch.randint(0, 1000, (BATCH,)), torch.randint(0, 11, (BATCH,))

    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            loss = F.mse_loss(model(x, t, labels), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def predict(model):
        def forward():
            with torch.no_grad():
                return model(x, t, labels)

        return forward

    def check():
        for model in models.values():
            model.load_state_dict(models["pynn"].state_dict())
            assert_agrees(model(x, t, labels).detach(), models["pynn"](x, t, labels).detach(), torch.float32, "unet")

    described = {"op": "unet", "shape": f"{BATCH}x1x8x8", "dtype": "float32", "check": check}
    yield Case(mode="forward", providers={name: predict(m) for name, m in models.items()}, **described)
    yield Case(mode="training step", providers={name: train(m) for name, m in models.items()}, **described)


def _model(layers, memory_format) -> UNet:
    torch.manual_seed(0)
    model = UNet(**DIGITS, layers=layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)  # a zero-initialised model would compare zeros
    model.memory_format = memory_format
    return model.to(memory_format=memory_format) if layers is TORCH_LAYERS else model
