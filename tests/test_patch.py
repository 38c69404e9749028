"""pynn.patch and pynn.unpatch on models of torch.nn layers."""

import copy
import pickle

import peers
import pytest
import torch
from torch import nn

import pynn


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect"),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 5),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class Recurrent(nn.Module):
    """An LSTM, a GRU on its outputs, and a cell on the last of them."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.cell = nn.RNNCell(8, 5)

    def forward(self, x):
        y, _ = self.lstm(x)
        _, h = self.gru(y)
        return self.cell(h[0])


MODELS = {
    "convolutional": (convolutional, (2, 3, 8, 8)),
    "transformer": (transformer, (2, 7, 6)),
    "recurrent": (Recurrent, (2, 7, 6)),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(1)
    return make(), torch.randn(shape)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return (y - torch.linspace(-1, 2, y.numel()).view(y.shape)).square().mean()


def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return peers.losses(model, lambda model: loss_of(model, x))


@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_gradients_and_training(name):
    expected, x = build(name)
    model = copy.deepcopy(expected)
    assert pynn.patch(model).replaced
    for training in (True, False):
        y, truth = model.train(training)(x), expected.train(training)(x)
        assert (y - truth).abs().max() <= 1e-5 * truth.abs().max()
    grads = [torch.autograd.grad(loss_of(m.train(), x), m.parameters()) for m in (model, expected)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
    torch.testing.assert_close(losses(model, x), losses(expected, x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_pynn_run(name):
    model, x = build(name)
    pynn.patch(model)
    with pynn.explain() as calls:
        model(x)
    wanted = {
        "convolutional": {"conv2d_fwd", "group_norm_fwd"},
        "transformer": {"scaled_dot_product_attention_fwd"},
        "recurrent": {"lstm_fwd", "gru_fwd", "rnn_fwd"},
    }[name]
    assert wanted <= {call.op for call in calls}


def test_nothing_but_the_class_changes():
    model, x = build("convolutional")
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    parameters, state = [*map(id, model.parameters())], copy.deepcopy(model.state_dict())
    pynn.patch(model.eval())
    assert {name: (id(module), True) for name, module in model.named_modules()} == before
    assert [*map(id, model.parameters())] == parameters
    assert list(model.state_dict()) == list(state)
    model(x)
    assert seen == ["hook"]
    assert isinstance(model[0], nn.Conv2d)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(nn.Sequential(*model[1:]))))
    assert all(type(module[-3]) is pynn.nn.ConvTranspose2d for module in copies)


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_every_bit(name):
    model, x = build(name)
    kinds = [type(module) for module in model.modules()]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    truth = model(x)
    replaced = pynn.patch(model).replaced
    assert [layer.name for layer in pynn.unpatch(model).replaced] == [layer.name for layer in replaced]
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(x), truth)
    assert not pynn.unpatch(model).replaced


def test_report_says_what_and_why():
    class Own(nn.Conv2d):
        pass

    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    model = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1), "b": Own(1, 1, 1), "c": weighted, "d": nn.Linear(1, 1)})
    report = pynn.patch(model)
    assert [(layer.name, layer.kind) for layer in report.replaced] == [("a", "Conv2d")]
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert reasons["b"] == "a subclass of Conv2d: its own code would be lost"
    assert reasons["c"].startswith("a subclass of Conv2d")
    assert reasons["d"] == "no pynn layer of this kind"
    assert "layers replaced" in str(report)
    assert "no pynn layer of this kind" in str(report)


def test_a_layer_itself_and_a_second_patch():
    layer = nn.GroupNorm(1, 4)
    assert pynn.patch(layer).replaced[0].kind == "GroupNorm"
    assert type(layer) is pynn.nn.GroupNorm
    again = pynn.patch(layer)
    assert not again.replaced
    assert not again.kept


def test_pynn_layers_of_the_model_stay():
    model = nn.Sequential(pynn.nn.Conv2d(1, 1, 1, activation="relu"), nn.Conv2d(1, 1, 1))
    pynn.patch(model)
    pynn.unpatch(model)
    assert [type(module) for module in model] == [pynn.nn.Conv2d, nn.Conv2d]
    assert model[0].activation == "relu"


@pytest.mark.parametrize("function", [pynn.patch, pynn.unpatch])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got dict"):
        function({})
