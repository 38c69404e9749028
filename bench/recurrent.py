"""Recurrent layers: sequences, one step, short and unequal sequences, loops of cells; on a GPU a grid of LSTMs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import pynn
from bench import _gpu, _layer_norm_lstm
from bench.harness import Case, assert_agrees

SHAPES = (
    (100, 32, 128, 128),
    (50, 64, 256, 256),
    (200, 1, 256, 256),
    (128, 16, 512, 512),
)  # steps, batch, input, hidden
DECODE = tuple((1, 1, hidden, hidden) for hidden in (256, 512, 1024))
SHORT = ((1, 1, 512, 512), (1, 16, 512, 512), *((steps, 16, 512, 512) for steps in (4, 8, 16)))  # trained step by step
GPU_SHAPES = tuple((256, b, h, h) for h in (128, 192, 256, 512, 768, 1024, 2048) for b in (1, 16, 64, 256))
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# With gains of 1 the gradients through 200 norms explode, and roundings with them: errors of 1e-3 to 5e-2, of either
# side, from draw to draw. Small gains are where recurrent norms are started (Cooijmans et al., arXiv 1603.09025: 0.1).
NORM_GAIN = 0.1
KERNELS = {"LSTM": "lstm_fwd", "GRU": "gru_fwd", "RNN": "rnn_fwd", "LayerNormLSTM": "layer_norm_lstm_fwd"}
BOTH = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer and a shape. packed: rows of unequal lengths, as a PackedSequence. cells: a loop over a cell."""

    layer: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = BOTH
    proj_size: int = 0
    packed: bool = False
    cells: bool = False
    on_gpu: bool = False

    @property
    def name(self) -> str:
        extra = f" proj {self.proj_size}" if self.proj_size else " packed" if self.packed else ""
        return f"{self.layer}Cell loop" if self.cells else f"{self.layer}{extra}"

    @property
    def flops(self) -> float:
        """Of a forward pass over all steps."""
        steps, batch, size, hidden = self.shape
        gates = {"GRU": 3, "RNN": 1}.get(self.layer, 4) * hidden
        state = self.proj_size or hidden
        return 2.0 * steps * batch * (gates * (size + state) + self.proj_size * hidden)


def cases(quick: bool = False) -> Iterator[Case]:
    problems = [Problem("LSTM", shape) for shape in SHAPES]
    problems += [Problem("LSTM", shape, modes=BOTH[:1]) for shape in DECODE]
    problems += [Problem("LSTM", shape, modes=BOTH[1:]) for shape in SHORT]
    problems += [Problem("LSTM", shape, modes=BOTH[1:], packed=True) for shape in (SHAPES[0], SHAPES[3])]
    problems += [Problem(layer, shape) for layer in ("GRU", "RNN", "LayerNormLSTM") for shape in SHAPES]
    problems += [Problem("LSTM", shape, cells=True) for shape in SHAPES]
    problems += [Problem("LSTM", shape, proj_size=shape[3] // 2) for shape in (SHAPES[0], SHAPES[3])]
    dtypes = (torch.bfloat16, torch.float64)
    problems += [Problem("LSTM", shape, dtype) for dtype in dtypes for shape in (SHAPES[0], SHAPES[3])]
    if quick:
        short = (10, 4, 32, 32)
        problems = [Problem(layer, short) for layer in KERNELS]
        problems += [Problem("LSTM", DECODE[0], modes=BOTH[:1]), Problem("LSTM", short, packed=True)]
        problems += [Problem("LSTM", short, cells=True), Problem("LSTM", short, proj_size=16)]
    for problem in problems:
        yield from _cases(problem)


def gpu_cases(quick: bool = False) -> Iterator[Case]:
    for shape, dtype in itertools.product(GPU_SHAPES[9:10] if quick else GPU_SHAPES, GPU_DTYPES):
        yield from _cases(Problem("LSTM", shape, dtype, on_gpu=True))
    if not quick:
        for layer, dtype in itertools.product(("GRU", "RNN"), GPU_DTYPES):
            yield from _cases(Problem(layer, (256, 64, 512, 512), dtype, on_gpu=True))


def _cases(problem: Problem) -> Iterator[Case]:
    steps, batch, size, hidden = problem.shape
    device = "cuda" if problem.on_gpu else "cpu"
    torchs = _layer_norm_lstm if problem.layer == "LayerNormLSTM" else torch.nn
    namespaces = {"torch": torchs, "pynn": pynn.nn}
    options: dict = {"device": device, "dtype": problem.dtype}
    if problem.proj_size:
        options["proj_size"] = problem.proj_size
    layers = {}
    for name, namespace in namespaces.items():
        layers[name] = getattr(namespace, problem.layer + ("Cell" if problem.cells else ""))(size, hidden, **options)
    for name, parameter in layers["torch"].named_parameters():
        if name.startswith("norm_") and "bias" not in name:
            parameter.data.mul_(NORM_GAIN)
    layers["pynn"].load_state_dict(layers["torch"].state_dict())
    x = torch.randn(steps, batch, size, device=device).to(problem.dtype).requires_grad_()
    states = _states(problem, device)
    lengths = torch.linspace(steps, max(1, steps // 5), batch).long()

    def apply(layer, x: Tensor, states) -> Tensor:
        """The output of a layer, or the data of its packed output."""
        if problem.cells:
            return _loop(layer, x, states)
        if problem.packed:
            return layer(pack_padded_sequence(x, lengths), states)[0].data
        return layer(x, states)[0]

    def forward(layer):
        with torch.no_grad():
            return apply(layer, x, states)

    with torch.no_grad():
        grad = torch.randn_like(apply(layers["torch"], x, states))

    def train(layer):
        return torch.autograd.grad(apply(layer, x, states), (x, *layer.parameters()), grad)

    backends = _gpu.backends_with(KERNELS[problem.layer]) if problem.on_gpu else ["cpu"]

    def providers(run: Callable) -> dict[str, Callable[[], object]]:
        result: dict[str, Callable[[], object]] = {}
        for backend in backends:  # around the backward too
            name = f"pynn {backend}" if problem.on_gpu else "pynn"
            result[name] = functools.partial(_gpu.on, backend, run, layers["pynn"])
        result["torch"] = functools.partial(run, layers["torch"])
        if not problem.on_gpu and not problem.cells and problem.layer == "LSTM":
            result["torch native"] = functools.partial(_without_onednn, run, layers["torch"])
        if problem.shape in DECODE and not problem.cells:
            result["torch cell"] = functools.partial(run, _Step(layers["torch"]))
        return result

    def check():
        wide = type(layers["torch"])(size, hidden, **{**options, "dtype": torch.float64})
        wide.load_state_dict({k: v.double() for k, v in layers["torch"].state_dict().items()})
        leaf = x.detach().double().requires_grad_()
        wide_states = None if states is None else tuple(s.double() for s in _tuple(states))
        wide_states = wide_states if problem.layer == "LSTM" or wide_states is None else wide_states[0]
        truth = torch.autograd.grad(apply(wide, leaf, wide_states), (leaf, *wide.parameters()), grad.double())
        peers = train(layers["torch"])
        for backend in backends:
            for got, want, peer in zip(_gpu.on(backend, train, layers["pynn"]), truth, peers, strict=True):
                assert_agrees(got, want, problem.dtype, f"{problem.name} {problem.shape}, {backend}", peer)

    described = {
        "op": problem.name,
        "shape": "T{}xB{}xI{}xH{}".format(*problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "check": check,
        "device": device,
    }
    for mode, run, factor in (("forward", forward, 1), ("forward+backward", train, 3)):
        if mode in problem.modes:
            yield Case(mode=mode, providers=providers(run), flops=factor * problem.flops, **described)


def _tuple(states):
    return states if isinstance(states, tuple) else (states,)


def _states(problem: Problem, device: str):
    """Given states, as a decoder has them; None where a sequence starts from zeros."""
    steps, batch, _, hidden = problem.shape
    if steps > 1 or problem.cells:
        return None
    shape = (1, batch, hidden)
    h, c = (torch.randn(shape, device=device).to(problem.dtype) for _ in range(2))
    return (h, c) if problem.layer == "LSTM" else h


def _loop(cell, x: Tensor, states) -> Tensor:
    outputs = []
    for step in x:
        states = cell(step, states)
        outputs.append(states[0] if isinstance(states, tuple) else states)
    return torch.stack(outputs)


def _without_onednn(run: Callable, layer):
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    try:
        return run(layer)
    finally:
        torch._C._set_mkldnn_enabled(before)


class _Step(torch.nn.Module):
    """torch.nn.LSTMCell with the weights of a layer, called like the layer on sequences of one step."""

    def __init__(self, layer: torch.nn.LSTM):
        super().__init__()
        self.cell = torch.nn.LSTMCell(layer.input_size, layer.hidden_size, dtype=layer.weight_hh_l0.dtype)
        self.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})

    def forward(self, x, states):
        h, c = self.cell(x[0], (states[0][0], states[1][0]))
        return h[None], (h[None], c[None])
