"""How the recurrent kernels are launched, the first of these that can be:

- for a sequence of few units once, with a program for each tile of rows;
- for a sequence whose programs can all run at once a single time, cooperatively: they wait for each other (a team);
- once or, with a projection, twice for each step.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from . import recurrent_configs as configs
from .recurrent_bwd import resident_bwd_kernel, step_bwd_kernel
from .recurrent_fwd import project_kernel, resident_kernel, step_kernel
from .recurrent_team import COUNTER_STRIDE

LSTM, GRU, TANH, RELU = range(4)  # csrc/include/recurrent.h
_INT32 = 2**31


def gates_of(cell: int) -> int:
    return 4 if cell == LSTM else 3 if cell == GRU else 1


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A recurrent layer's sizes; the kernels and tiles that follow from them.

    Args:
        like: a tensor of its dtype and device.
        state: width of h: hidden, or the rows of weight_hr.
        projected: there is a weight_hr.
    """

    cell: int
    like: torch.Tensor
    steps: int
    batch: int
    hidden: int
    state: int
    projected: bool
    reverse: bool

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.like.dtype is torch.float64 else torch.float32

    @property
    def gates(self) -> int:
        return gates_of(self.cell)

    @property
    def saved(self) -> int:
        """Values of a unit that the forward keeps and, but for an RNN's one, gradients of a unit."""
        return 4 if self.cell in (LSTM, GRU) else 0

    def wide(self, *shape: int) -> torch.Tensor:
        """An uninitialised tensor in `compute`."""
        return self.like.new_empty(shape, dtype=self.compute)

    def new_states(self) -> torch.Tensor:
        """The output with room for h0 behind it, see `forward`."""
        return self.like.new_empty(self.steps + 1, self.batch, self.state)

    @functools.cached_property
    def _kind(self) -> str:
        return {8: "fp64", 4: "fp32", 2: "half"}[self.like.element_size()]

    @functools.cached_property
    def _pack(self) -> int:
        """Elements of 16 bytes where rows are made of them, otherwise 1."""
        pack = 16 // self.like.element_size()
        return pack if self.hidden % pack == 0 and self.state % pack == 0 else 1

    def _loop_tile(self, *, backward: bool) -> tuple[configs.Tile, bool] | tuple[None, bool]:
        found = (
            None
            if self.projected
            else configs.loop_tile(self._kind, self.gates, self.hidden, self._pack > 1, backward=backward)
        )
        return found or (None, False)

    def _constants(self, tile: configs.Tile) -> dict[str, object]:
        return {
            "REVERSE": self.reverse,
            "PACK": self._pack,
            "COMPUTE": tl.float64 if self.compute is torch.float64 else tl.float32,
            "BLOCK_B": tile.rows,
            "BLOCK_H": tile.units,
            "enable_fp_fusion": False,  # left to the compiler, two kernels would round the same formula differently
            **tile.options,
        }

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.steps, self.batch, self.hidden // self._pack, self.state // self._pack

    def _launcher(self, kernel, width: int, tile: configs.Tile, constants: dict[str, object]) -> _Launcher:
        programs = triton.cdiv(self.batch, tile.rows) * triton.cdiv(width, tile.units)
        return _Launcher(kernel, programs, {**constants, **self._constants(tile)})

    def _team(self, kernel, operands: tuple, length: int, *, side_by_side: bool, **extra: object) -> bool:
        """Makes the sequence with a team, sums being so long, if that can be; otherwise returns False.

        The counters are cleared on the stream, so a captured launch clears them whenever it is replayed.
        """
        if self.projected or self.steps == 1:
            return False
        for tile in configs.team_tiles(
            self._kind, self.batch, self.hidden, length, self._pack > 1, side_by_side=side_by_side
        ):
            teams, members = triton.cdiv(self.batch, tile.rows), triton.cdiv(self.hidden, tile.units)
            if members * (self.steps + 1) >= _INT32:  # arrivals of a team
                continue
            constants = {
                "CELL": self.cell, "LOOP": False, "BLOCK_K": tile.depth,
                "CHUNKS": triton.cdiv(length, tile.depth) if tile.kept else 0,
                "counters": self.like.new_zeros(teams * COUNTER_STRIDE.value, dtype=torch.int32),
                "launch_cooperative_grid": True,
            }  # fmt: skip
            launch = self._launcher(kernel, self.hidden, tile, constants | extra)
            if launch.runs_at_once(operands, self.like.device):
                launch(*operands)
                return True
        return False

    # ------------------------------------------------------------ forward

    def forward(
        self, states, h_n, c_n, gates, cells, products, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, lengths
    ):
        """Fills h_n, c_n, all but the last of `states`, and gates and cells if not None.

        c0, c_n and cells are in `compute`.
        """
        output = states[: self.steps]
        with torch.cuda.device_of(self.like):
            tile, ahead = self._loop_tile(backward=False)
            if tile is not None and not tile.depth:
                launch = self._launcher(resident_kernel, self.hidden, tile, {"CELL": self.cell, "AHEAD": ahead})
                launch(
                    output, h_n, gates, cells, products, weight_hh, bias_ih, bias_hh, h0, c0, c_n, lengths,
                    0, self.steps, *self._sizes[:3],
                )  # fmt: skip
                return
            loop = tile is not None
            tile = tile or configs.step_tile(self._kind, self.batch, self.hidden, self._pack > 1)
            slot = self.steps
            if slot > 1:
                states[slot].copy_(h0)
            else:
                states, slot = h0, 0
            if not loop and self._team(
                step_kernel,
                (
                    output, h_n, gates, cells, products, weight_hh, bias_ih, bias_hh, states, slot, c0, c_n, lengths,
                    0, self.steps, *self._sizes,
                ),
                self.hidden, side_by_side=self.gates > 1, PROJECTED=False,
            ):  # fmt: skip
                return
            hiddens = self.like.new_empty(self.batch, self.hidden) if self.projected else None
            constants = {
                "CELL": self.cell, "PROJECTED": self.projected, "LOOP": loop, "BLOCK_K": tile.depth, "hiddens": hiddens
            }  # fmt: skip
            step = self._launcher(step_kernel, self.hidden, tile, constants)
            project = self._launcher(project_kernel, self.state, tile, {"BLOCK_K": tile.depth})
            several = self.steps if loop else 1
            for s in range(0, self.steps, several):
                step(
                    output, h_n, gates, cells, products, weight_hh, bias_ih, bias_hh, states, slot,
                    c0 if s == 0 else c_n, c_n, lengths, s, s + several, *self._sizes,
                )  # fmt: skip
                if self.projected:
                    project(output, h_n, hiddens, weight_hr, lengths, s, *self._sizes)

    # ------------------------------------------------------------ backward

    def backward(
        self, grad_gates, grad_states, hiddens, grad_h, grad_c, grad_output, gates, cells, output, h0, c0,
        weight_hh, weight_hr, lengths,
    ) -> None:  # fmt: skip
        """Fills grad_gates, and grad_states and hiddens if projected.

        grad_h (batch, state) and grad_c (batch, hidden), in `compute`, hold the gradients of h_n and c_n and then
        those of h0 and c0.
        """
        kept = (gates, cells, output, h0, c0)
        with torch.cuda.device_of(self.like):
            tile, _ = self._loop_tile(backward=True)
            flow = (grad_gates, grad_h, grad_h, grad_c, grad_c, grad_output)
            whole = (*flow, *kept, weight_hh, lengths, self.steps - 1, -2, *self._sizes)
            if tile is not None:
                if tile.depth:
                    constants = {"CELL": self.cell, "LOOP": True, "BLOCK_K": tile.depth}
                    self._launcher(step_bwd_kernel, self.hidden, tile, constants)(*whole)
                else:
                    launch = self._launcher(resident_bwd_kernel, self.hidden, tile, {"CELL": self.cell})
                    launch(*whole[:-1])
                return
            if self._team(step_bwd_kernel, whole, self.gates * self.hidden, side_by_side=False):
                return
            tile = configs.step_tile(self._kind, self.batch, self.hidden, self._pack > 1)
            constants = {"CELL": self.cell, "LOOP": False, "BLOCK_K": tile.depth}
            if not self.projected:
                step = self._launcher(step_bwd_kernel, self.hidden, tile, constants)
                for s in range(self.steps - 1, -2, -1):
                    step(*flow, *kept, weight_hh, lengths, s, s - 1, *self._sizes)
                return
            constants |= {"grad_states": grad_states, "hiddens": hiddens}
            states = self._launcher(step_bwd_kernel, self.state, tile, {**constants, "CELLS": False})
            step = self._launcher(step_bwd_kernel, self.hidden, tile, {**constants, "CELLS": True})
            for s in range(self.steps - 1, -2, -1):
                states(*flow, *kept, weight_hh, lengths, s, s - 1, *self._sizes)
                if s >= 0:
                    step(*flow, *kept, weight_hr, lengths, s, s - 1, *self._sizes)


class _Launcher:
    """Launches a kernel many times with operands that differ in values only: it is looked up once."""

    def __init__(self, kernel, programs: int, constants: dict[str, object]):
        self._kernel, self._grid, self._constants = kernel, (programs, 1, 1), constants
        self._compiled, self._rest = None, ()

    def runs_at_once(self, operands: tuple, device: torch.device) -> bool:
        """Whether all programs do, so that one may wait for another. One to a processor always do."""
        programs, processors = self._grid[0], configs.processors(device)
        if programs <= processors:
            return True
        if programs > 2 * processors or device.type != "cuda":
            return False
        kernel = self._kernel.warmup(*operands, grid=self._grid, **self._constants)
        kernel._init_handles()  # what ptxas made of it
        held = configs.programs_held(kernel.n_regs, kernel.metadata.shared, self._constants["num_warps"], device)
        return programs <= processors * held

    def __call__(self, *operands) -> None:
        if self._compiled is not None:
            self._compiled[self._grid](*operands, *self._rest)
            return
        self._compiled = self._kernel[self._grid](*operands, **self._constants)
        if self._compiled is not None:  # None in the interpreter
            following = self._kernel.params[len(operands) :]
            self._rest = tuple(self._constants.get(p.name, p.default) for p in following)
