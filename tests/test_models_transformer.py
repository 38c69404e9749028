"""Transformers: parts against their formulas and torch.nn, generation, CLIP and CLAP, errors.

Comparisons with transformers, timm and torchvision under the same weights are in test_weights.py.
"""

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pynn
from pynn.models import (
    CLAP,
    CLIP,
    GPT,
    T5,
    Attention,
    Bert,
    KeyValueCache,
    LearnedPositionalEmbedding,
    LogMel,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
    TextTower,
    Transformer,
    TransformerBlock,
    ViT,
)


def tokens(*shape, vocab=50):
    return torch.randint(vocab, shape)


def gpt(**options) -> GPT:
    model = GPT(50, 16, 32, 2, 4, **options).eval()
    peers.randomise(model)
    return model


def test_sinusoidal_positions_are_the_formula():
    table = SinusoidalPositionalEncoding(7, 6)(torch.zeros(1, 7, 6))[0]
    for p in range(7):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("kind", [SinusoidalPositionalEncoding, LearnedPositionalEmbedding])
def test_positions_start_anywhere(kind):
    positions, x = kind(9, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(positions(x)[:, 3:], positions(x[:, 3:], 3))
    with pytest.raises(ValueError, match=r"start \+ L <= 9, got \(2, 5, 4\) with start 5"):
        positions(x, 5)


def test_rotary_scores_depend_on_distance_only():
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = [(rotary(q, a) * rotary(k, b)).sum() for a, b in ((0, 3), (5, 8), (40, 43))]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotary(q, 6).norm(), q.norm(), rtol=1e-6, atol=0)
    pair = torch.zeros(1, 1, 2, 8)
    pair[..., 1] = 1.0  # channel 1 is turned into channel 5
    turned = rotary(pair)[0, 0, 1]
    angle = 10_000 ** (-2 / 8)
    assert turned[1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert turned[5].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_relative_position_buckets():
    bias = RelativePositionBias(2, buckets=8, max_distance=16)
    distance = torch.arange(-20, 21)
    bucket = bias.buckets(distance)
    assert bucket[distance == 0] == 0
    assert bucket[distance == -1] == 1  # exact
    assert bucket[distance == 1] == 5  # the other direction has the upper half
    assert (bucket[distance <= -16] == 3).all()
    assert (bucket[distance >= 16] == 7).all()
    assert (bucket[:21].diff() <= 0).all()
    causal = RelativePositionBias(2, 8, 16, bidirectional=False)
    assert (causal.buckets(distance)[distance > 0] == 0).all()
    assert causal(3, 5).shape == (1, 2, 3, 5)
    torch.testing.assert_close(causal(3, 5), causal(5, 5)[:, :, 2:])


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_torchs(bias):
    ours, theirs = Attention(12, 3, bias=bias), nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    peers.randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    peers.assert_close(ours(x), theirs(x, x, x)[0])
    peers.assert_close(ours(x, memory), theirs(x, memory, memory)[0])
    future = torch.ones(5, 5).triu(1).bool()
    peers.assert_close(ours(x, is_causal=True), theirs(x, x, x, attn_mask=future)[0])


def test_attention_with_its_own_width_and_scale():
    layer = Attention(6, 2, head_width=5, scale=1.0, bias=False)
    x, bias = torch.randn(1, 4, 6), torch.randn(1, 2, 4, 4)
    q, k, v = (layer.in_proj_weight @ x[0].T).view(3, 2, 5, 4)
    weights = (torch.einsum("hdi,hdj->hij", q, k) + bias[0]).softmax(-1)
    expected = torch.einsum("hij,hdj->ihd", weights, v).flatten(1) @ layer.out_proj.weight.T
    peers.assert_close(layer(x, mask=bias)[0], expected)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("decoder", [False, True])
def test_block_is_torchs(norm, decoder):
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    theirs = kind(12, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm == "pre")
    ours = TransformerBlock(12, 3, 20, norm=norm, cross_attention=decoder)
    peers.randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    inputs = (x, memory) if decoder else (x,)
    outputs = [model(*inputs) for model in (ours, theirs)]
    peers.assert_close(*outputs)
    for output in outputs:
        peers.backward(output)
    peers.assert_gradients_close(*({name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)))


def test_gated_rms_block_is_the_formula():
    block = TransformerBlock(8, 2, 12, activation="silu", rms=True, bias=False, gated=True)
    peers.randomise(block)
    x = torch.randn(2, 3, 8)

    def rms(h, norm):
        return h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight

    h = x + block.self_attn(rms(x, block.norm1))
    z = rms(h, block.norm2)
    expected = h + (F.silu(z @ block.linear1.weight.T) * (z @ block.gate.weight.T)) @ block.linear2.weight.T
    peers.assert_close(block(x), expected)
    assert not any(name.endswith("bias") for name in block.state_dict())


def test_transformer_is_torchs():
    theirs = nn.Transformer(12, 3, 2, 2, 20, dropout=0.0, batch_first=True)
    ours = Transformer(12, 3, 2, 2, 20, dropout=0.0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    peers.randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    source, target = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    source_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    target_mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    future = torch.ones(5, 5).triu(1).bool()
    outputs = [
        ours(source, target, source_mask, target_mask),
        theirs(
            source,
            target,
            tgt_mask=future,
            tgt_is_causal=False,
            src_key_padding_mask=~source_mask,
            tgt_key_padding_mask=~target_mask,
            memory_key_padding_mask=~source_mask,
        ),
    ]
    peers.assert_close(*outputs)
    for output in outputs:
        peers.backward(output)
    peers.assert_gradients_close(*({name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)))
    memory = ours.encode(source)
    peers.assert_close(ours.decode(target, memory), ours(source, target))
    peers.assert_close(
        ours(source, target, is_causal=False), theirs(source, target, src_is_causal=False, tgt_is_causal=False)
    )


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_gpt_sees_no_future_and_caches_keep_everything(positions):
    model, ids = gpt(positions=positions), tokens(2, 12)
    with torch.no_grad():
        whole = model(ids)
        changed = ids.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % 50
        torch.testing.assert_close(model(changed)[:, :7], whole[:, :7])
        caches = model.caches()
        parts = [model(part, caches) for part in ids.split([5, 1, 4, 2], dim=1)]
    peers.assert_close(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match="at most 4 tokens, got 5"):
        model(tokens(2, 5), caches)


def test_generation_without_chance_is_the_most_likely_continuation():
    model, ids = gpt(), tokens(3, 4)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 8, temperature=0), expected)
    assert torch.equal(model.generate(ids, 8, top_k=1), expected)
    assert torch.equal(model.generate(ids, 8, top_p=1e-6), expected)
    assert torch.equal(model.generate(ids, 0), ids)


def test_generation_stops_each_row_at_the_stop_token():
    model, ids = gpt(), tokens(3, 4)
    free = model.generate(ids, 10, temperature=0)
    stop = free[0, 6].item()
    got = model.generate(ids, 10, temperature=0, stop_token=stop)
    for row, free_row in zip(got, free, strict=True):
        ends = (free_row[4:] == stop).nonzero()
        end = 4 + ends[0].item() if len(ends) else free.shape[1]
        assert torch.equal(row[:end], free_row[: min(end, len(row))])
        assert (row[end:] == stop).all()
    one = model.generate(ids[:1], 10, temperature=0, stop_token=stop)
    assert one.shape[1] < free.shape[1]  # no tokens after all rows have ended
    assert one[0, -1] == stop


def test_t5_writes_the_most_likely_continuation():
    torch.manual_seed(1)
    model, ids = T5(40, 24, 2, 3, dropout=0.0).eval(), tokens(3, 6) % 40
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    expected = ids.new_full((3, 1), 7)
    with torch.no_grad():
        memory = model.encode(ids, mask)
        caches = model.caches(9, 6)
        for _ in range(8):
            expected = torch.cat([expected, model(ids, expected, mask)[:, -1].argmax(-1, keepdim=True)], 1)
        parts = [model.decode(part, memory, mask, caches) for part in expected.split([4, 1, 3, 1], dim=1)]
    peers.assert_close(torch.cat(parts, 1), model.decode(expected, memory, mask))
    options = {"attention_mask": mask, "start_token": 7, "temperature": 0}
    assert torch.equal(model.generate(ids, 8, stop_token=None, **options), expected[:, 1:])
    stop = expected[0, 3].item()
    first = model.generate(ids, 8, stop_token=stop, **options)[0]
    end = expected[0, 1:].tolist().index(stop)
    assert torch.equal(first[: end + 1], expected[0, 1 : end + 2])
    assert (first[end:] == stop).all()
    with pytest.raises(ValueError, match=r"T5\.generate: expected max_new_tokens >= 0, got -1"):
        model.generate(ids, -1)


def test_generation_follows_the_generator_and_the_probabilities():
    model, ids = gpt(), tokens(1, 4)

    def draw(seed, rows=1, new=6, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids.expand(rows, -1), new, generator=generator, **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1, new=12), draw(2, new=12))
    with torch.no_grad():
        probabilities = (model(ids)[0, -1] / 2.0).softmax(-1)
    drawn = draw(3, rows=4000, new=1, temperature=2.0)[:, -1]
    frequencies = torch.bincount(drawn, minlength=50) / 4000
    assert (frequencies - probabilities).abs().max() < 4 * math.sqrt(0.25 / 4000)
    order = probabilities.argsort(descending=True)
    assert set(draw(3, 500, 1, temperature=2.0, top_k=3)[:, -1].tolist()) <= set(order[:3].tolist())
    nucleus = int((probabilities[order].cumsum(0) < 0.5).sum()) + 1
    found = set(draw(4, 2000, 1, temperature=2.0, top_p=0.5)[:, -1].tolist())
    assert found == set(order[:nucleus].tolist())


def test_padding_has_no_influence():
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    other = ids.clone()
    other[1, 5:] = (other[1, 5:] + 7) % 50
    bert = Bert(50, 8, 16, 2, 2).eval()
    t5 = T5(50, 16, 2, 2).eval()
    for model in (bert, t5):
        peers.randomise(model)
    torch.testing.assert_close(bert(ids, mask).hidden[1, :5], bert(other, mask).hidden[1, :5])
    torch.testing.assert_close(t5(ids, ids, mask), t5(other, ids, mask))
    torch.testing.assert_close(bert(ids, mask).hidden[1, :5], bert(ids[1:, :5]).hidden[0], rtol=1e-4, atol=1e-5)


def test_bert_builds_only_the_heads_asked_for():
    outputs = Bert(50, 8, 16, 1, 2, mlm=False, pooler=False, sentence=False, segments=0)(tokens(2, 8))
    assert outputs.hidden.shape == (2, 8, 16)
    assert outputs[1:] == (None, None, None)


def test_models_learn():
    """Each model halves the loss of a small task that it can only solve by using its inputs."""
    ids = tokens(16, 6, vocab=8)
    repeated = torch.cat([ids[:, :3], ids[:, :3]], 1)
    images = torch.randn(16, 1, 8, 8)
    tasks = {
        "GPT": (
            GPT(8, 6, 32, 1, 4),
            lambda m: F.cross_entropy(m(repeated)[:, 2:5].flatten(0, 1), ids[:, :3].flatten()),
        ),
        "Bert": (Bert(8, 6, 32, 1, 4, dropout=0.0), lambda m: F.cross_entropy(m(ids).token_logits.mT, ids)),
        "T5": (T5(8, 32, 1, 4, dropout=0.0), lambda m: F.cross_entropy(m(ids, ids.roll(1, 1)).mT, ids)),
        "ViT": (ViT(8, 4, 1, 8, 32, 1, 4), lambda m: F.cross_entropy(m(images), ids[:, 0])),
    }
    for name, (model, loss_of) in tasks.items():
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        found = []
        for _ in range(60):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert found[-1] < 0.5 * found[0], f"{name}: {found[0]:.3f} to {found[-1]:.3f}"


@pytest.mark.parametrize("training", [False, True])
def test_dropout_only_in_training(training):
    ids = tokens(2, 6)
    for model in (GPT(50, 6, 16, 1, 2, dropout=0.5), T5(50, 16, 1, 2, dropout=0.5)):
        model.train(training)
        inputs = (ids, ids) if isinstance(model, T5) else (ids,)
        assert torch.equal(model(*inputs), model(*inputs)) != training


def test_attention_of_pynn_runs():
    with pynn.explain() as calls, torch.no_grad():
        gpt()(tokens(1, 4))
        ViT(8, 4, 1, 2, 16, 1, 2)(torch.randn(1, 1, 8, 8))
    assert [call.op for call in calls].count("scaled_dot_product_attention_fwd") == 3


def test_compiles_whole():
    torch._dynamo.reset()
    model, ids = gpt(), tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    peers.assert_close(compiled(ids), model(ids))
    torch._dynamo.reset()


def small_clip() -> CLIP:
    image = ViT(8, 4, 1, None, 16, 1, 2, pre_norm=True, patch_bias=False, activation="quick_gelu")
    return CLIP(image, TextTower(50, 8, 16, 1, 2), 12)


def test_clip_loss_is_the_formula_and_learns():
    model, images, ids = small_clip(), torch.randn(4, 1, 8, 8), tokens(4, 8)
    a, b = model.encode_image(images), model.encode_text(ids)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(4))
    logits = a @ b.T / 0.07
    expected = -(logits.log_softmax(1).diag() + logits.log_softmax(0).diag()).mean() / 2
    torch.testing.assert_close(model.loss(images, ids), expected, rtol=1e-5, atol=1e-6)
    outputs = model(images[:3], ids)
    assert outputs.logits.shape == (3, 4)
    torch.testing.assert_close(outputs.logits, outputs.logits_per_text.T)
    found = peers.losses(model, lambda model: model.loss(images, ids), steps=30, lr=0.02)
    assert found[-1] < 0.5 * found[0]
    with pytest.raises(ValueError, match=r"CLIP\.loss: expected a text per input, got 4 inputs and 3 texts"):
        model.loss(images, ids[:3])


def test_text_tower_reads_the_end_token():
    ids = torch.tensor([[3, 9, 49, 0, 0], [3, 49, 0, 0, 0]])
    by_value, by_token = TextTower(50, 8, 16, 1, 2), TextTower(50, 8, 16, 1, 2, end_token=49)
    by_token.load_state_dict(by_value.state_dict())
    torch.testing.assert_close(by_value(ids), by_token(ids))
    other = ids.clone()
    other[0, 3:] = 5  # after the end
    torch.testing.assert_close(by_value(ids), by_value(other))
    mask = ids > 0
    torch.testing.assert_close(by_value(ids, mask), by_value(ids), rtol=1e-5, atol=1e-6)


def test_log_mel_finds_the_pitch():
    mel = LogMel(bands=40)
    t = torch.arange(16_000) / 16_000
    sound = torch.stack([torch.sin(2 * math.pi * f * t) for f in (440.0, 3000.0)])
    picture = mel(sound)
    assert picture.shape == (2, 1, 40, 98)  # (16000 - 400) // 160 + 1
    hertz = torch.arange(257) * 16_000 / 512
    for row, frequency in zip(picture, (440.0, 3000.0), strict=True):
        band = mel.filters[row[0, :, 50].argmax()]
        low, high = hertz[band > 0][[0, -1]]
        assert low - 32 <= frequency <= high + 32
    # The energy of a frame, band by band, from the definition.
    noise = torch.randn(1, 560)
    frame = noise[0, 160:].double() * torch.hann_window(400, dtype=torch.float64)
    power = torch.fft.fft(frame, 512)[:257].abs().square()
    expected = (mel.filters.double() @ power).clamp(min=1e-10).log()
    torch.testing.assert_close(mel(noise)[0, 0, :, 1].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mel(torch.zeros(1, 400)), torch.full((1, 1, 40, 1), math.log(1e-10)))


def audio() -> nn.Module:
    return nn.Sequential(LogMel(8000, bands=16), ViT((16, 8), (8, 4), 1, None, 16, 1, 2))


def test_clap_learns():
    text = Bert(50, 8, 16, 1, 2, mlm=False, sentence=False, segments=1, padding_token=1, dropout=0.0)
    model = CLAP(audio(), text, 12, audio_width=16)
    t = torch.arange(760) / 8000
    sounds = torch.stack([torch.sin(2 * math.pi * f * t) for f in (200.0, 700.0, 1500.0, 3000.0)])
    ids = tokens(4, 6) + 2
    ids = ids.clamp(max=49)
    found = peers.losses(model, lambda model: model.loss(sounds, ids), steps=80, lr=0.001)
    assert found[-1] < 0.5 * found[0]
    outputs = model(sounds, ids)
    torch.testing.assert_close(
        outputs.logits / model.logit_scale_a.exp(), (outputs.logits_per_text / model.logit_scale_t.exp()).T
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("name", ["GPT", "GPT rotary", "Bert", "T5", "Transformer", "CLIP", "CLAP"])
def test_same_on_a_gpu(name):
    ids, mask = tokens(2, 6), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    models = {
        "GPT": (lambda: GPT(50, 8, 32, 2, 4), (ids,)),
        "GPT rotary": (lambda: GPT(50, 8, 32, 2, 4, positions="rotary"), (ids,)),
        "Bert": (lambda: Bert(50, 8, 32, 2, 4, padding_token=1), (ids, mask)),
        "T5": (lambda: T5(50, 32, 2, 4), (ids, ids, mask)),
        "Transformer": (lambda: Transformer(32, 4, 1, 1, 32), (torch.randn(2, 6, 32), torch.randn(2, 5, 32), mask)),
        "CLIP": (small_clip, (torch.randn(2, 1, 8, 8), ids, mask)),
        "CLAP": (
            lambda: CLAP(audio(), TextTower(50, 8, 16, 1, 2), 8, 16),
            (torch.randn(2, 760), ids, mask),
        ),
    }
    make, inputs = models[name]
    model = make().eval()
    expected = model(*inputs)
    got = model.cuda()(*(tensor.cuda() for tensor in inputs))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)
    if isinstance(model, GPT):
        assert model.generate(ids[:, :3].cuda(), 4, temperature=0).shape == (2, 7)


IDS = torch.zeros(1, 4, dtype=torch.int64)
ERRORS = [
    (lambda: TransformerBlock(8, 2, 8, norm="mid"), 'norm to be "pre" or "post", got \'mid\''),
    (lambda: TransformerBlock(8, 2, 8, activation="mish"), "activation to be one of"),
    (lambda: TransformerBlock(8, 3, 8), "heads to divide width, got 3 and 8"),
    (lambda: TransformerBlock(8, 2, 8)(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)), "built without cross_attention"),
    (lambda: TransformerBlock(8, 2, 8, cross_attention=True)(torch.zeros(1, 2, 8)), "got no memory"),
    (lambda: Transformer(8, 2, 1, 1, 8)(torch.zeros(1, 2, 7), torch.zeros(1, 2, 8)), r"source of shape \(B, L, 8\)"),
    (lambda: Transformer(8, 2, 1, 1, 8).encode(torch.zeros(1, 2, 8), torch.ones(1, 3)), "attention_mask of shape"),
    (lambda: GPT(5, 4, 8, 1, 2, positions="none"), "got 'none'"),
    (lambda: GPT(5, 4, 8, 1, 2)(IDS.float()), "dtype int64, got"),
    (lambda: GPT(5, 3, 8, 1, 2)(IDS), "at most 3 tokens, got 4"),
    (lambda: GPT(5, 6, 8, 1, 2).generate(IDS, 3), r"max_new_tokens <= 2 \(context_length - L\), got 3"),
    (lambda: GPT(5, 6, 8, 1, 2).generate(IDS, 1, temperature=-1), "temperature >= 0"),
    (lambda: GPT(5, 6, 8, 1, 2).generate(IDS, 1, top_k=0), "top_k >= 1"),
    (lambda: GPT(5, 6, 8, 1, 2).generate(IDS, 1, top_p=1.5), r"top_p in \(0, 1\]"),
    (lambda: Bert(5, 4, 8, 1, 2, pooler=False), "sentence head reads the pooler"),
    (lambda: Bert(5, 4, 8, 1, 2)(IDS, torch.ones(1, 3)), r"attention_mask of shape \(1, 4\), got \(1, 3\)"),
    (lambda: Bert(5, 4, 8, 1, 2, segments=0)(IDS, None, IDS), r"\(0 segments\)"),
    (lambda: ViT(10, 4), "patch_size to divide image_size"),
    (lambda: ViT(8, 4, 1, 2, 8, 1, 2)(torch.zeros(1, 1, 8, 9)), r"\(B, 1, 8, 8\), got \(1, 1, 8, 9\)"),
    (lambda: CLIP(nn.Identity(), TextTower(5, 4, 8, 1, 2)), "Identity has no attribute width"),
    (lambda: CLAP(ViT(8, 4, 1, None, 8, 1, 2), Bert(5, 4, 8, 1, 2, pooler=False, sentence=False)), "pooler=True"),
    (lambda: LogMel(low=5000, high=4000), "low < high"),
    (lambda: LogMel(bands=400), "narrower than the 512 point spectrum"),
    (lambda: LogMel()(torch.zeros(1, 100)), "samples >= 400, got"),
    (lambda: RotaryEmbedding(5), "even head_width, got 5"),
    (lambda: SinusoidalPositionalEncoding(4, 5), "even width, got 5"),
    (lambda: KeyValueCache(1).append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)), "at most 1 tokens, got 2"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
