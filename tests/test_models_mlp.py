"""Perceptron, MLP, RBFNet and KNNClassifier against hand-derived gradients, known limits and scikit-learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pynn.models.mlp import MLP, KNNClassifier, Perceptron, RBFNet

XOR_X = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
XOR_Y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])


def test_hand_derived_backpropagation_is_autograd():
    """The delta rules of three sigmoid layers under the squared error.

    d_k = (y_k - t_k) y_k (1 - y_k) at the output, d_j = h_j (1 - h_j) sum_k w_kj d_k below it; the gradient of a weight
    is the d of its unit times the activation before it.
    """
    torch.manual_seed(0)
    model = MLP([5, 7, 6, 3], activation="sigmoid").double()
    x, target = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    loss = 0.5 * (model(x).sigmoid() - target).square().sum()
    loss.backward()

    first, second, third = (layer for layer in model if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        h1 = (x @ first.weight.T + first.bias).sigmoid()
        h2 = (h1 @ second.weight.T + second.bias).sigmoid()
        y = (h2 @ third.weight.T + third.bias).sigmoid()
        d3 = (y - target) * y * (1 - y)
        d2 = h2 * (1 - h2) * (d3 @ third.weight)
        d1 = h1 * (1 - h1) * (d2 @ second.weight)
    for layer, delta, activation in ((third, d3, h2), (second, d2, h1), (first, d1, x)):
        torch.testing.assert_close(layer.weight.grad, delta.T @ activation, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.bias.grad, delta.sum(0), rtol=0, atol=1e-6)


def test_the_delta_rule_is_a_gradient_step():
    torch.manual_seed(1)
    unit = Perceptron(6, 2, rule="delta").double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    weight, bias = (p.detach().clone().requires_grad_() for p in (unit.linear.weight, unit.linear.bias))
    gradients = torch.autograd.grad(0.5 * (F.linear(x, weight, bias).sigmoid() - y).square().sum(), (weight, bias))
    unit.update(x, y, learning_rate=0.3)
    torch.testing.assert_close(unit.linear.weight, (weight - 0.3 * gradients[0]).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(unit.linear.bias, (bias - 0.3 * gradients[1]).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("target", "solvable"), [([0, 1, 1, 1], True), ([0, 0, 0, 1], True), ([0, 1, 1, 0], False)])
def test_the_perceptron_rule_separates_what_a_plane_can(target, solvable):
    y = torch.tensor(target, dtype=torch.float32)[:, None]
    for seed in range(5):
        torch.manual_seed(seed)
        unit = Perceptron(2, 1).fit(XOR_X, y, epochs=200)
        right = (unit(XOR_X) == y).sum().item()
        assert right == 4 if solvable else right <= 3


def test_an_mlp_solves_xor():
    solved = 0
    for seed in range(3):
        torch.manual_seed(seed)
        model = MLP([2, 4, 1], activation="tanh")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(XOR_X), XOR_Y).backward()
            optimizer.step()
        solved += torch.equal((model(XOR_X) > 0).float(), XOR_Y)
    assert solved >= 2


def test_rbf_net_is_its_formula():
    torch.manual_seed(0)
    model = RBFNet(3, 4, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    width = model.log_width.exp()
    phi = torch.stack(
        [torch.exp(-(x - c).square().sum(1) / (2 * s * s)) for c, s in zip(model.centers, width, strict=True)], 1
    )
    torch.testing.assert_close(model(x), phi @ model.linear.weight.T + model.linear.bias)
    assert torch.autograd.gradcheck(model, x.requires_grad_())


def test_rbf_net_starts_from_given_centers():
    centers = torch.tensor([[0.0, 0.0], [0.0, 2.0], [5.0, 0.0]])
    model = RBFNet(2, 3, 1, centers=centers)
    torch.testing.assert_close(model.centers.detach(), centers)
    torch.testing.assert_close(model.log_width.detach().exp(), torch.full((3,), (2 + 2 + 5) / 3))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_knn_is_scikit_learns(k):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="needs the [train] extra")
    pixels, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    # The pixels are small integers: scikit-learn breaks the many equal distances in no order of its own.
    x, y = torch.from_numpy(pixels) + 1e-3 * torch.rand(pixels.shape, dtype=torch.float64), torch.from_numpy(labels)
    pixels = x.numpy()
    theirs = neighbors.KNeighborsClassifier(k, algorithm="brute").fit(pixels[:1200], labels[:1200])
    ours = KNNClassifier(k, chunk=100).fit(x[:1200], y[:1200])
    agreement = (ours.predict(x[1200:]) == torch.from_numpy(theirs.predict(pixels[1200:]))).double().mean().item()
    assert agreement == 1
    expected = torch.from_numpy(theirs.predict_proba(pixels[1200:]))
    torch.testing.assert_close(ours.predict_proba(x[1200:]), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perceptron(2, 1, rule="hebb"), "rule to be 'perceptron' or 'delta', got 'hebb'"),
        (lambda: Perceptron(0, 1), "in_features of at least 1, got 0"),
        (lambda: Perceptron(2, 1)(torch.zeros(4, 3)), r"x of shape \(B, 2\), got \(4, 3\)"),
        (lambda: Perceptron(2, 1).update(XOR_X, XOR_Y[:, 0], 1.0), r"y of shape \(4, 1\), got \(4,\)"),
        (lambda: MLP([3]), r"at least two positive sizes, got \[3\]"),
        (lambda: MLP([3, 2], activation="step"), "activation to be one of relu, .*, got 'step'"),
        (lambda: RBFNet(2, 3, 1, centers=torch.zeros(2, 3)), r"centers of shape \(3, 2\), got \(2, 3\)"),
        (lambda: KNNClassifier(0), "k and chunk of at least 1, got 0"),
        (lambda: KNNClassifier(3).fit(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)), "at least k = 3 samples"),
        (lambda: KNNClassifier(3).fit(torch.zeros(2, 2), torch.zeros(2)), "int64 y"),
        (lambda: KNNClassifier(3).predict(torch.zeros(2, 2)), r"expected fit\(\) before predict"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
