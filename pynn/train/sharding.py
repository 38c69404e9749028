"""Fully sharded data parallelism (torch's FSDP2) for `fit`: every process keeps a part of each weight and its moments.

Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel", 2023. The weights of a unit are
gathered when it runs; units are the members of the model's Sequentials and ModuleLists, and what is left is one more.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

_WHOLE = StateDictOptions(full_state_dict=True)


class Sharded:
    """A copy of a model, and an optimizer of it, in parts over all processes.

    Args:
        model: what the copy is made of, on the CPU; it is brought up to date by `collect`.
        optimizer: of the model's parameters, its state is taken over. build: makes an optimizer from parameters.
        device: of this process. processes: their number.
    Raises:
        ValueError: there is one process only.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: Any, build: Any, device: torch.device, processes: int
    ) -> None:
        if processes < 2:
            raise ValueError("shard: expected several processes, started by torchrun, got one")
        self._model, self._optimizer = model, optimizer
        self.model = copy.deepcopy(model).to(device)
        mesh = init_device_mesh(device.type, (processes,))
        for unit in _units(self.model):
            fully_shard(unit, mesh=mesh)
        self.optimizer = build([p for p in self.model.parameters() if p.requires_grad])
        if optimizer.state:
            state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
            set_optimizer_state_dict(self.model, self.optimizer, state, options=_WHOLE)

    def collect(self) -> None:
        """Brings the whole model and its optimizer up to date. Every process has to call it."""
        self._model.load_state_dict(get_model_state_dict(self.model, options=_WHOLE))
        state = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
        set_optimizer_state_dict(self._model, self._optimizer, state, options=_WHOLE)


def _units(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The inner ones first, as fully_shard wants them; the model itself is the last."""
    lists = (torch.nn.Sequential, torch.nn.ModuleList)
    members = {member for module in model.modules() if isinstance(module, lists) for member in module.children()}
    found = [module for module in model.modules() if module in members and not isinstance(module, lists)]
    return [*(unit for unit in reversed(found) if any(True for _ in unit.parameters()) and unit is not model), model]
