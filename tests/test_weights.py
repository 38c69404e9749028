"""load_weights and export_weights: models of transformers, timm and torchvision with the same weights; files; errors.

Each peer's weights go through its own files: loaded here, compared in outputs and gradients, written and read back by
the peer.
"""

import os
import pickle

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pynn
from pynn.models import CLAP, CLIP, GPT, T5, Bert, ResNet, TextTower, ViT
from pynn.models.cnn import BasicBlock
from pynn.weights import WeightsError

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MASK = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])


def ids(vocab=37, length=7):
    return torch.randint(2, vocab, (2, length))


class Case:
    """Ours, the peer's, and how each is called: a tensor of the outputs."""

    def __init__(self, ours, theirs, run_ours, run_theirs):
        self.ours, self.theirs, self.run_ours, self.run_theirs = ours, theirs, run_ours, run_theirs


def bert(kind, **heads):
    hf = peers.load("transformers")
    config = hf.BertConfig(vocab_size=37, max_position_embeddings=9, **SMALL, **OFF)
    x, segments = ids(), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, -1)
    ours = Bert(37, 9, 24, 2, 3, 40, dropout=0.0, **heads)

    def outputs(*tensors):
        return torch.cat([t.flatten() for t in tensors if t is not None])

    def run_ours(model):
        y = model(x, MASK, segments)
        if kind == "BertModel":
            return outputs(y.hidden, y.pooled)
        return outputs(y.token_logits, y.sentence_logits)

    def run_theirs(model):
        y = model(x, attention_mask=MASK.long(), token_type_ids=segments)
        if kind == "BertModel":
            return outputs(y.last_hidden_state, y.pooler_output)
        return outputs(y[0], y[1] if len(y) > 1 else None)

    return Case(ours, getattr(hf, kind)(config), run_ours, run_theirs)


def gpt2():
    hf = peers.load("transformers")
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    theirs = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=37, n_positions=9, n_embd=24, n_layer=2, n_head=3, **off))
    x = ids()
    return Case(GPT(37, 9, 24, 2, 3), theirs, lambda m: m(x), lambda m: m(x).logits)


def t5(v11=False):
    hf = peers.load("transformers")
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if v11 else {}  # the latter: no scale
    config = hf.T5Config(
        vocab_size=37, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=3, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, **options,
    )  # fmt: skip
    config.tie_word_embeddings = not v11  # transformers 5 ties whatever it is given
    own = {"activation": "gelu_tanh", "gated": True, "tied": False} if v11 else {}
    ours = T5(37, 24, 2, 3, 40, 10, 3, buckets=8, max_distance=12, dropout=0.0, **own)
    x, y = ids(), ids(length=6)
    theirs = hf.T5ForConditionalGeneration(config)
    theirs.set_input_embeddings(theirs.shared)  # untied output layer, but one embedding, as in the files of T5 v1.1
    return Case(
        ours,
        theirs,
        lambda m: m(x, y, MASK),
        lambda m: m(input_ids=x, attention_mask=MASK.long(), decoder_input_ids=y).logits,
    )


def vit():
    hf = peers.load("transformers")
    config = hf.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SMALL, **OFF)
    x = torch.randn(2, 3, 16, 16)
    ours = ViT(16, 8, 3, 5, 24, 2, 3, 40, eps=1e-12)
    return Case(ours, hf.ViTForImageClassification(config), lambda m: m(x), lambda m: m(x).logits)


def clip():
    hf = peers.load("transformers")
    text = {"vocab_size": 37, "max_position_embeddings": 9, "eos_token_id": 36, "bos_token_id": 0, **SMALL}
    vision = {"image_size": 16, "patch_size": 8, **SMALL}
    theirs = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    image = ViT(16, 8, 3, None, 24, 2, 3, 40, pre_norm=True, patch_bias=False, activation="quick_gelu", eps=1e-5)
    ours = CLIP(image, TextTower(37, 9, 24, 2, 3, 40, end_token=36), 12)
    x, y = torch.randn(3, 3, 16, 16), ids(36)
    y[0, 4], y[1, 6] = 36, 36
    return Case(ours, theirs, lambda m: m(x, y).logits, lambda m: m(input_ids=y, pixel_values=x).logits_per_image)


def clap_text():
    hf = peers.load("transformers")
    config = hf.ClapTextConfig(
        vocab_size=37, max_position_embeddings=11, type_vocab_size=1, projection_dim=12, **SMALL, **OFF
    )
    text = Bert(37, 9, 24, 2, 3, 40, segments=1, mlm=False, sentence=False, dropout=0.0, padding_token=1)
    ours = CLAP(nn.Identity(), text, 12, audio_width=4)
    x = ids()
    x[1, 5:] = 1

    def run_ours(model):
        return model.text_projection(model.text_tower(x, MASK).pooled)

    theirs = hf.ClapTextModelWithProjection(config)
    return Case(ours, theirs, run_ours, lambda m: m(x, attention_mask=MASK.long()).text_embeds)


HF = {
    "BertForPreTraining": lambda: bert("BertForPreTraining"),
    "BertForMaskedLM": lambda: bert("BertForMaskedLM", pooler=False, sentence=False),
    "BertModel": lambda: bert("BertModel", mlm=False, sentence=False),
    "GPT-2": gpt2,
    "T5": t5,
    "T5 v1.1": lambda: t5(v11=True),
    "ViT": vit,
    "CLIP": clip,
    "CLAP text": clap_text,
}


@pytest.mark.parametrize("name", HF)
def test_hugging_face(name, tmp_path):
    case = HF[name]()
    ours, theirs = case.ours.eval(), case.theirs.eval()
    peers.randomise(theirs)
    theirs.save_pretrained(tmp_path)
    assert pynn.load_weights(ours, tmp_path / "model.safetensors") == "hf"
    outputs = case.run_ours(ours), case.run_theirs(theirs)
    peers.assert_close(*outputs)

    written = tmp_path / "written"
    theirs.config.save_pretrained(written)
    pynn.save_weights(ours, written / "model.safetensors", "hf")
    again, problems = type(theirs).from_pretrained(written, output_loading_info=True)
    missing = {key for key in problems["missing_keys"] if not key.endswith(("position_ids", "token_type_ids"))}
    assert not missing, problems  # those two are constants
    assert not problems["mismatched_keys"], problems
    peers.assert_close(case.run_theirs(again.eval()), outputs[1], bound=1e-6)

    for output in outputs:  # the gradients, as weights of a model that is written as before
        peers.backward(output)
    for model in (ours, theirs):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)
    expected = {n: t for n, t in read(tmp_path).items() if t.is_floating_point() and t.any()}
    got = pynn.export_weights(ours, "hf")
    if name == "BertModel":
        got = {n.removeprefix("bert."): t for n, t in got.items()}
    peers.assert_gradients_close({n: t for n, t in got.items() if t.any()}, expected)


@pytest.mark.parametrize(
    ("make", "new", "start", "stop", "masked"),
    [(t5, 6, {"decoder_start_token_id": 0}, 1, True), (gpt2, 2, {}, 0, False)],
)
def test_generation_is_transformers(make, new, start, stop, masked):
    """The most likely tokens, from the same weights."""
    case, x = make(), ids()
    peers.randomise(case.theirs)
    pynn.load_weights(case.ours, case.theirs.state_dict(), "hf")
    own = {"attention_mask": MASK} if masked else {}
    found = case.ours.eval().generate(x, new, temperature=0, stop_token=stop, **own)
    # Without its cache, which counts the layers of the encoder in a decoder of more.
    options = {
        "do_sample": False,
        "use_cache": False,
        "max_new_tokens": new,
        "pad_token_id": stop,
        "eos_token_id": stop,
        **start,
    }
    mask = MASK if masked else torch.ones_like(MASK)
    expected = case.theirs.eval().generate(x, attention_mask=mask.long(), **options)
    assert torch.equal(found, expected[:, -found.shape[1] :])


def read(directory):
    return peers.load("safetensors.torch").load_file(directory / "model.safetensors")


@pytest.mark.parametrize(("size", "options"), [(32, {}), (32, {"pre_norm": True})])
def test_timm_vit(size, options):
    timm = peers.load("timm")
    theirs = timm.models.VisionTransformer(
        size, 8, num_classes=5, embed_dim=24, depth=2, num_heads=3, pre_norm=bool(options)
    ).eval()
    peers.randomise(theirs)
    bias = not options  # timm leaves it out before a normalisation
    ours = ViT(size, 8, 3, 5, 24, 2, 3, patch_bias=bias, eps=theirs.norm.eps, **options).eval()
    assert pynn.load_weights(ours, theirs.state_dict()) == "timm"
    x = torch.randn(2, 3, size, size)
    outputs = [model(x) for model in (ours, theirs)]
    peers.assert_close(*outputs)
    for output in outputs:
        peers.backward(output)
    theirs.load_state_dict(pynn.export_weights(ours, "timm"))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    peers.assert_gradients_close(
        pynn.export_weights(ours, "timm"), {name: p.grad for name, p in theirs.named_parameters()}
    )


def test_torchvision_vit_b_16():
    torchvision = peers.load("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.vit_b_16(image_size=32, num_classes=5).eval()
        ours = ViT(32, 16, 3, 5).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.to_empty(device="cpu")
    peers.randomise(theirs)
    pynn.load_weights(ours.to_empty(device="cpu"), theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    outputs = [model(x) for model in (ours, theirs)]
    peers.assert_close(*outputs)
    for output in outputs:
        peers.backward(output)
    peers.assert_gradients_close(*({name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)))


def test_patched_timm_vit():
    timm = peers.load("timm")
    model = timm.models.VisionTransformer(16, 8, num_classes=4, embed_dim=24, depth=2, num_heads=3)
    peers.randomise(model)
    x, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    peers.assert_patch_is_faithful(
        model, lambda m: m(x), lambda m: F.cross_entropy(m(x), target), {"conv2d_fwd"}, lr=1e-3
    )


@pytest.mark.parametrize("name", HF)
def test_patched_attention(name):
    """The layers stay transformers' own, the attention between them is pynn's: causal, with a bias, padded, crossed."""
    case = HF[name]()
    peers.randomise(case.theirs)
    target = torch.randn_like(case.run_theirs(case.theirs))
    peers.assert_patch_is_faithful(
        case.theirs,
        case.run_theirs,
        lambda m: F.mse_loss(case.run_theirs(m), target),
        {"scaled_dot_product_attention_fwd"},
        lr=1e-4,
    )
    report = pynn.patch(case.theirs)
    assert f"{type(case.theirs).__name__} attention" in {layer.kind for layer in report.replaced}
    assert "LayerNorm" in str(report.kept)
    assert not pynn.patch(case.theirs).replaced


@pytest.mark.parametrize("name", ["Gemma 2", "gpt-oss"])
def test_patched_attention_that_sdpa_lacks(name):
    """Soft caps and sliding windows; sinks and sliding windows."""
    transformers = peers.load("transformers")
    sizes = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "pad_token_id": 0}
    if name == "Gemma 2":
        config = transformers.Gemma2Config(**sizes, attn_logit_softcapping=2.0, query_pre_attn_scalar=1)
        model = transformers.Gemma2ForCausalLM(config)
    else:
        config = transformers.GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
        model = transformers.GptOssForCausalLM(config)
    peers.randomise(model)
    ids = torch.arange(18).reshape(2, 9) % 17
    attended = torch.ones_like(ids)
    attended[1, :3] = 0
    wanted = {"scaled_dot_product_attention_fwd"}

    def run(m):
        return m(input_ids=ids, attention_mask=attended, use_cache=False).logits[attended.bool()]

    target = torch.randn_like(run(model))
    peers.assert_patch_is_faithful(model, run, lambda m: F.mse_loss(run(m), target), wanted, lr=1e-4)


def test_attention_that_is_not_replaced():
    theirs = nn.ModuleDict({"bert": HF["BertModel"]().theirs})
    theirs["bert"].set_attn_implementation("eager")  # for its weights, as sdpa is there
    kind = f"{type(theirs['bert']).__name__} attention"
    (layer,) = (layer for layer in pynn.patch(theirs).kept if layer.kind == kind)
    assert layer.name == "bert"
    assert layer.reason == "its attention implementation is eager, not sdpa"
    assert theirs["bert"].config._attn_implementation == "eager"


def small_gpt(**options) -> GPT:
    return GPT(11, 6, 8, 1, 2, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("layout", ["pynn", "hf"])
def test_files_of_every_kind(ending, layout, tmp_path):
    if ending == ".safetensors":
        peers.load("safetensors")
    model, other = small_gpt(), small_gpt()
    peers.randomise(model)
    pynn.save_weights(model, tmp_path / f"model{ending}", layout)
    assert not same(model, other)
    assert pynn.load_weights(other, tmp_path / f"model{ending}") == layout
    assert same(model, other)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_and_wrappers(key, tmp_path):
    model, other = small_gpt(), small_gpt()
    peers.randomise(model)
    state = {"module._orig_mod." + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}}, tmp_path / "run.ckpt")
    pynn.load_weights(other, tmp_path / "run.ckpt")
    assert same(model, other)


def test_a_model_may_have_a_wrappers_name():
    model, other = (nn.ModuleDict({"module": nn.Linear(2, 2)}) for _ in range(2))
    assert pynn.load_weights(other, model.state_dict()) == "pynn"
    assert same(model, other)


def test_dtypes_are_converted_and_storage_stays():
    model, other = small_gpt(), small_gpt()
    addresses = [p.data_ptr() for p in other.parameters()]
    half = {name: tensor.bfloat16() for name, tensor in pynn.export_weights(model).items()}
    pynn.load_weights(other, half)
    assert [p.data_ptr() for p in other.parameters()] == addresses
    assert other.token_embedding.weight.dtype is torch.float32
    assert torch.equal(other.token_embedding.weight, model.token_embedding.weight.bfloat16().float())


def test_exports_are_copies():
    model = small_gpt()
    exported = pynn.export_weights(model, "hf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in exported.values():
        assert tensor.is_contiguous()
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_error_names_everything_and_changes_nothing():
    model = small_gpt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = pynn.export_weights(small_gpt(), "hf")
    del weights["transformer.ln_f.weight"]
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].T
    weights["transformer.h.1.ln_1.weight"] = torch.zeros(8)
    weights["transformer.extra"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        pynn.load_weights(model, weights)
    assert str(caught.value).splitlines() == [
        "load_weights: GPT in layout 'hf'",
        "  missing (1): transformer.ln_f.weight",
        "  unexpected (2): transformer.h.1.ln_1.weight, transformer.extra",
        "  mismatched (1): transformer.h.0.mlp.c_fc.weight: (32, 8) instead of (8, 32)",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_second_copies_must_be_equal():
    model, weights = small_gpt(), pynn.export_weights(small_gpt(), "hf")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 6, 6)  # the causal mask in old files
    assert pynn.load_weights(model, weights) == "hf"
    weights["lm_head.weight"] += 1
    with pytest.raises(
        WeightsError, match=r"lm_head.weight \(not the copy of token_embedding.weight that it should be\)"
    ):
        pynn.load_weights(model, weights)
    untied = small_gpt(tied=False)
    pynn.load_weights(untied, weights)
    assert torch.equal(untied.head.weight, weights["lm_head.weight"])


def test_old_files_lack_counters():
    model = ResNet(BasicBlock, [1], 3, 1, 4)
    weights = {n: t for n, t in pynn.export_weights(model).items() if not n.endswith("num_batches_tracked")}
    assert pynn.load_weights(model, weights, "torchvision") == "torchvision"


class Exploit:
    """What an attacker pickles: a call, made when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_does_not_run(ending, zipped, tmp_path):
    target, file = tmp_path / "hacked", tmp_path / f"weights{ending}"
    content = {"state_dict": {"weight": torch.zeros(2)}, "hook": Exploit(target)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="unpickling them could run any code"):
        pynn.load_weights(nn.Linear(2, 2), file)
    file.write_bytes(pickle.dumps(Exploit(target)))
    with pytest.raises(WeightsError):
        pynn.load_weights(nn.Linear(2, 2), file)
    assert not target.exists()
    pickle.loads(pickle.dumps(Exploit(target)))
    assert target.exists()  # it would have


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files(ending, damage, tmp_path):
    if ending == ".safetensors":
        peers.load("safetensors")
    file = tmp_path / f"weights{ending}"
    pynn.save_weights(small_gpt(), file)
    content = file.read_bytes()
    changed = {"cut": content[: len(content) // 2], "noise": bytes(torch.randint(256, (4096,)).tolist()), "empty": b""}[
        damage
    ]
    file.write_bytes(changed)
    with pytest.raises(WeightsError, match=str(file)):
        pynn.load_weights(small_gpt(), file)


def test_errors(tmp_path):
    model = small_gpt()
    with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got dict"):
        pynn.load_weights({}, {})
    with pytest.raises(FileNotFoundError, match="no file"):
        pynn.load_weights(model, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="layout of GPT to be one of pynn, hf, got 'timm'"):
        pynn.load_weights(model, {}, "timm")
    with pytest.raises(WeightsError, match="layout of Linear to be one of pynn, got 'hf'"):
        pynn.export_weights(nn.Linear(1, 1), "hf")
    with pytest.raises(WeightsError, match="tensors by name, got 'epoch': int"):
        pynn.load_weights(model, {"epoch": 3})
    with pytest.raises(WeightsError, match=r"end in \.safetensors, .*got 'x\.txt'"):
        pynn.save_weights(model, tmp_path / "x.txt")
    with torch.device("meta"):
        empty = small_gpt()
    with pytest.raises(WeightsError, match="on the meta device"):
        pynn.load_weights(empty, pynn.export_weights(model))
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="tensors by name, got list"):
        pynn.load_weights(model, tmp_path / "list.pt")
    with pytest.raises(WeightsError, match=r"without a name in this layout .*: encoder.ln_pre"):
        pynn.load_weights(ViT(8, 4, 1, 2, 8, 1, 2, pre_norm=True), {}, "hf")
    with pytest.raises(WeightsError, match=r"'hf' has no name for encoder.ln_pre"):
        pynn.export_weights(ViT(8, 4, 1, 2, 8, 1, 2, pre_norm=True), "hf")
