"""Recurrent and tree models: formulas, padding, carried states, generation, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pynn.models.rnn import CELLS, SCORES, Alignment, Captioner, CharLM, Seq2Seq, SequenceClassifier, SequenceTagger
from pynn.models.tree import RecursiveNet, TreeClassifier

TREES = torch.tensor([2, 2, 5, 4, 5, -1, 7, -1, -1])  # two trees and a node on its own


def ids(*shape, vocab=11):
    return torch.randint(vocab, shape)


# Attention scores


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_their_formulas(score):
    align = Alignment(score, 6).double()
    q, k = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    expected = torch.empty(2, 3, 5, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            for s in range(5):
                a, c = q[b, t], k[b, s]
                if score == "dot":
                    value = (a * c).sum()
                elif score == "cosine":
                    value = align.log_strength.exp() * (a * c).sum() / (a.norm() * c.norm())
                else:
                    z = align.query.weight @ a + align.query.bias + align.key.weight @ c
                    if score == "additive":
                        z = z.tanh()
                    else:
                        z = (align.hidden.weight @ z.clamp(min=0) + align.hidden.bias).clamp(min=0)
                    value = align.value.weight[0] @ z
                expected[b, t, s] = value
    torch.testing.assert_close(align.scores(q, k), expected)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    seen, weights = align(q, k, mask)
    torch.testing.assert_close(seen, weights @ k)
    exact = expected.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, exact)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert not weights[1, :, [2, 4]].any()
    _, alone = align(q[1:], k[1:, [0, 1, 3]])
    torch.testing.assert_close(weights[1:, :, [0, 1, 3]], alone)


# Language model


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_in_parts_is_the_whole(cell):
    model = CharLM(11, 16, cell, layers=2, embedding=8)
    text = ids(3, 9)
    whole, last = model(text)
    state, parts = None, []
    for part in text.split((4, 1, 4), 1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)
    for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (state, last)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_generation_with_a_carried_state_is_the_whole_sequence_again(cell):
    model = CharLM(11, 16, cell, embedding=8)
    text = ids(2, 5)
    following = model.generate(text, 6, temperature=0)
    for _ in range(6):
        text = torch.cat((text, model(text)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(following, text[:, 5:])


def test_sampling_follows_the_distribution_and_the_generator():
    model = CharLM(4, 8, embedding=4)
    text = torch.zeros(4000, 1, dtype=torch.int64)
    drawn = [model.generate(text, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    shares = F.one_hot(drawn[0][:, 0], 4).float().mean(0)
    expected = model(text[:1])[0][0, 0].softmax(-1)
    torch.testing.assert_close(shares, expected.detach(), rtol=0, atol=0.04)


# Tagger and classifier


@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_nothing(cell):
    lengths = torch.tensor([4, 7, 1])
    text, x = ids(3, 7), torch.randn(3, 7, 5)
    tagger = SequenceTagger(11, 8, 3, cell, embedding=8)
    classifier = SequenceClassifier(5, 8, 3, cell, bidirectional=True, layers=2)
    seq2seq = Seq2Seq(11, 9, 8, "additive", cell, embedding=8)
    target = ids(3, 4, vocab=9)
    tags, classes = tagger(text, lengths), classifier(x, lengths)
    translation, alignments = seq2seq(text, target, src_lengths=lengths)
    assert tags.shape == (3, 7, 3)
    assert classes.shape == (3, 3)
    for row, n in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        torch.testing.assert_close(tags[one, :n], tagger(text[one, :n]), rtol=0, atol=1e-6)
        torch.testing.assert_close(classes[one], classifier(x[one, :n]), rtol=0, atol=1e-6)
        alone, weights = seq2seq(text[one, :n], target[one])
        torch.testing.assert_close(translation[one], alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(alignments[one, :, :n], weights, rtol=0, atol=1e-6)
        assert not alignments[one, :, n:].any()


def test_only_two_directions_see_what_follows():
    text = ids(1, 6)
    changed = text.clone()
    changed[0, -1] = (text[0, -1] + 1) % 11
    for bidirectional in (False, True):
        tagger = SequenceTagger(11, 8, 3, bidirectional=bidirectional, embedding=8)
        assert torch.equal(tagger(text)[0, 0], tagger(changed)[0, 0]) != bidirectional


def test_the_classifier_reads_the_last_states():
    model = SequenceClassifier(5, 8, 3, "lstm", bidirectional=True)
    x = torch.randn(2, 6, 5)
    output, _ = model.rnn(x)
    last = torch.cat((output[:, -1, :8], output[:, 0, 8:]), 1)
    torch.testing.assert_close(model(x), model.head(last))


# Captioner


@pytest.mark.parametrize("cell", CELLS)
def test_captions_are_the_most_likely_tokens_until_the_end(cell):
    model = Captioner(5, 7, 16, cell, embedding=8)
    features = torch.randn(6, 5)
    sentence = model.generate(features, start=0, end=3, max_len=10)
    assert sentence.shape[1] <= 10
    for row in range(6):
        said = [0]
        while len(said) <= 10 and (len(said) == 1 or said[-1] != 3):
            logits = model(features[row : row + 1], torch.tensor([said]))
            assert logits.shape == (1, len(said), 7)
            said.append(int(logits[0, -1].argmax()))
        said = (said[1:] + [3] * 10)[: sentence.shape[1]]
        assert sentence[row].tolist() == said


# Seq2Seq


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention", [None, *SCORES])
def test_greedy_decoding_agrees_with_teacher_forcing_on_its_own_tokens(attention, cell):
    model = Seq2Seq(11, 9, 16, attention, cell, start=2, embedding=8)
    source = ids(3, 5)
    logits, alignments = model(source, max_len=4)
    again, same = model(source, logits.argmax(-1))
    assert logits.shape == (3, 4, 9)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)
    if attention is None:
        assert alignments is None
    else:
        assert alignments.shape == (3, 4, 5)
        torch.testing.assert_close(same, alignments, rtol=0, atol=1e-6)
    again.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Trees


def test_recursive_net_is_the_recursion():
    net = RecursiveNet(4, 5, children=3).double()
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    first, second, third = net.weight.split(5)

    def state(node):
        z = net.input(x[node])
        below = [n for n in range(9) if TREES[n] == node]
        for child, weight in zip(below, (first, second, third), strict=False):
            z = z + state(child) @ weight
        return z.tanh()

    expected = torch.stack([state(node) for node in range(9)])
    actual = net(x, TREES)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    inputs = (x, *net.parameters())
    for a, b in zip(
        torch.autograd.grad(actual, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", ["lstm", "recursive"])
def test_a_node_depends_on_its_subtree_alone(cell):
    model = TreeClassifier(11, 8, 3, cell, embedding=8)
    tokens = ids(9)
    logits = model(tokens, TREES)
    assert logits.shape == (9, 3)
    changed = tokens.clone()
    changed[3] = (tokens[3] + 1) % 11
    differs = (model(changed, TREES) != logits).any(1)
    assert differs.tolist() == [False, False, False, True, True, True, False, False, False]


def test_the_order_of_children_counts_for_the_recursive_net_only():
    parents = torch.tensor([2, 2, -1])
    tokens, swapped = torch.tensor([1, 5, 0]), torch.tensor([5, 1, 0])
    for cell, counts in (("lstm", False), ("recursive", True)):
        model = TreeClassifier(11, 8, 3, cell, embedding=8).double()
        root, other = model(tokens, parents)[2], model(swapped, parents)[2]
        assert torch.allclose(root, other, atol=1e-12) != counts


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CharLM(0, 8), "CharLM: expected vocab of at least 1, got 0"),
        (lambda: CharLM(5, 8, "mgu"), "CharLM: expected cell to be one of rnn, lstm, gru, got 'mgu'"),
        (lambda: CharLM(5, 8)(torch.zeros(3, 4)), r"ids \(B, T\) integers, got \(3, 4\) torch.float32"),
        (lambda: CharLM(5, 8).generate(ids(2, 3, vocab=5), 0), "length of at least 1, got 0"),
        (lambda: SequenceTagger(5, 8, 2)(ids(4, vocab=5)), r"ids \(B, T\) integers, got \(4,\) torch.int64"),
        (lambda: SequenceClassifier(5, 8, 2)(torch.zeros(2, 3, 4)), r"x of shape \(B, T, 5\), got \(2, 3, 4\)"),
        (lambda: Captioner(5, 7, 8)(torch.zeros(2, 4), ids(2, 3, vocab=7)), r"features of shape \(B, 5\)"),
        (lambda: Seq2Seq(5, 5, 8, "hard"), "attention to be None or one of dot, additive, cosine, mlp, got 'hard'"),
        (lambda: Seq2Seq(5, 5, 8, start=5), "start from 0 to 4, got 5"),
        (lambda: Seq2Seq(5, 5, 8)(ids(2, 3, vocab=5)), "either tgt or max_len"),
        (lambda: Seq2Seq(5, 5, 8)(ids(2, 3, vocab=5), ids(3, 3, vocab=5)), "tgt with the 2 rows of src, got 3"),
        (lambda: RecursiveNet(4, 0), "hidden_size of at least 1, got 0"),
        (lambda: RecursiveNet(4, 5)(torch.zeros(3, 4), torch.tensor([-1, 0])), r"input of shape \(2, 4\)"),
        (lambda: RecursiveNet(4, 5)(torch.zeros(4, 4), torch.tensor([3, 3, 3, -1])), "at most 2 children .* got 3"),
        (lambda: TreeClassifier(5, 8, 2, "gru"), "cell to be 'lstm' or 'recursive', got 'gru'"),
        (lambda: TreeClassifier(5, 8, 2)(ids(1, 2, vocab=5), torch.tensor([-1])), r"ids \(N\) integers"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
