"""How other libraries name and arrange the tensors of the models in pynn.models.

A layout is a list of rules, from a tensor of ours to one or several of theirs. A `*` stands for one part of a name
between dots (or the rest of it) and is the same on both sides. Names of Hugging Face are those on the disk, which stay
when the classes in memory change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch

from . import models


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of ours, as theirs.

    Args:
        ours: pattern of our name.
        theirs: patterns of theirs; several are parts of ours along dimension 0.
        transposed: theirs is transposed. squeezed: leading dimensions of size 1 that theirs does not have.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    squeezed: int = 0

    def names(self, name: str) -> list[str] | None:
        """Their names of our tensor, None when the rule is about another one."""
        match = re.fullmatch(re.escape(self.ours).replace(r"\*", r"([^.]+)"), name)
        if match is None:
            return None
        return [pattern.replace("*", "{}").format(*match.groups()) for pattern in self.theirs]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one library for one model.

    Args:
        rules: the first that matches a tensor of ours counts.
        prefix: may be missing in front of all their names.
        tied: their names of a second copy of a tensor -> our name of it; checked to be equal, not written.
        ignored: patterns of theirs that hold nothing to learn, or what the model does not have by design.
        optional: patterns of ours that stay as they are when the file lacks them.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def rule(self, name: str) -> tuple[Rule, list[str]] | None:
        """The rule for our tensor, and their names of it."""
        for rule in self.rules:
            names = rule.names(name)
            if names is not None:
                return rule, names
        return None


def _rules(*pairs: tuple[str, str | tuple[str, ...]], **options) -> tuple[Rule, ...]:
    return tuple(Rule(ours, (theirs,) if isinstance(theirs, str) else theirs, **options) for ours, theirs in pairs)


def _under(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules for a model that is a part, `prefix`, of ours."""
    return tuple(dataclasses.replace(rule, ours=prefix + rule.ours) for rule in rules)


class _Native(Layout):
    """Our own names, whatever they are."""

    def rule(self, name: str) -> tuple[Rule, list[str]]:
        return Rule(name, (name,)), [name]


# Files from before torch 0.4.1, torchvision's among them, lack the counters of batch normalisation.
NATIVE = _Native((), optional=("**.num_batches_tracked",))


def _vit_timm(model: torch.nn.Module) -> Layout:
    block, theirs = "encoder.layers.encoder_layer_*.", "blocks.*."
    rules = _rules(
        ("class_token", "cls_token"),
        ("encoder.pos_embedding", "pos_embed"),
        ("conv_proj.*", "patch_embed.proj.*"),
        ("encoder.ln_pre.*", "norm_pre.*"),
        (block + "ln_1.*", theirs + "norm1.*"),
        (block + "self_attention.in_proj_*", theirs + "attn.qkv.*"),
        (block + "self_attention.out_proj.*", theirs + "attn.proj.*"),
        (block + "ln_2.*", theirs + "norm2.*"),
        (block + "mlp.0.*", theirs + "mlp.fc1.*"),
        (block + "mlp.3.*", theirs + "mlp.fc2.*"),
        ("encoder.ln.*", "norm.*"),
        ("heads.head.*", "head.*"),
    )
    return Layout(rules)


def _vit_hf(model: torch.nn.Module) -> Layout:
    block, theirs = "encoder.layers.encoder_layer_*.", "vit.encoder.layer.*."
    attention = theirs + "attention.attention."
    rules = _rules(
        ("class_token", "vit.embeddings.cls_token"),
        ("encoder.pos_embedding", "vit.embeddings.position_embeddings"),
        ("conv_proj.*", "vit.embeddings.patch_embeddings.projection.*"),
        (block + "ln_1.*", theirs + "layernorm_before.*"),
        (block + "self_attention.in_proj_*", (attention + "query.*", attention + "key.*", attention + "value.*")),
        (block + "self_attention.out_proj.*", theirs + "attention.output.dense.*"),
        (block + "ln_2.*", theirs + "layernorm_after.*"),
        (block + "mlp.0.*", theirs + "intermediate.dense.*"),
        (block + "mlp.3.*", theirs + "output.dense.*"),
        ("encoder.ln.*", "vit.layernorm.*"),
        ("heads.head.*", "classifier.*"),
    )
    return Layout(rules, prefix="vit.", ignored=("vit.pooler.dense.*",))


def _bert_rules(prefix: str) -> tuple[Rule, ...]:
    """BERT's encoder; RoBERTa's has the same names."""
    block, theirs = "encoder.layers.*.", prefix + "encoder.layer.*."
    attention = theirs + "attention.self."
    return _rules(
        ("token_embedding.*", prefix + "embeddings.word_embeddings.*"),
        ("position_embedding.*", prefix + "embeddings.position_embeddings.*"),
        ("segment_embedding.*", prefix + "embeddings.token_type_embeddings.*"),
        ("norm.*", prefix + "embeddings.LayerNorm.*"),
        (block + "self_attn.in_proj_*", (attention + "query.*", attention + "key.*", attention + "value.*")),
        (block + "self_attn.out_proj.*", theirs + "attention.output.dense.*"),
        (block + "norm1.*", theirs + "attention.output.LayerNorm.*"),
        (block + "linear1.*", theirs + "intermediate.dense.*"),
        (block + "linear2.*", theirs + "output.dense.*"),
        (block + "norm2.*", theirs + "output.LayerNorm.*"),
        ("pooler.*", prefix + "pooler.dense.*"),
    )


def _bert_hf(model: torch.nn.Module) -> Layout:
    heads = _rules(
        ("mlm_dense.*", "cls.predictions.transform.dense.*"),
        ("mlm_norm.*", "cls.predictions.transform.LayerNorm.*"),
        ("mlm_bias", "cls.predictions.bias"),
        ("sentence_head.*", "cls.seq_relationship.*"),
    )
    tied = {"cls.predictions.decoder.weight": "token_embedding.weight", "cls.predictions.decoder.bias": "mlm_bias"}
    return Layout(_bert_rules("bert.") + heads, "bert.", tied, ("bert.embeddings.position_ids",))


def _gpt_hf(model: torch.nn.Module) -> Layout:
    block, theirs = "decoder.layers.*.", "transformer.h.*."
    products = (
        ("self_attn.in_proj_", "attn.c_attn."),
        ("self_attn.out_proj.", "attn.c_proj."),
        ("linear1.", "mlp.c_fc."),
        ("linear2.", "mlp.c_proj."),
    )  # GPT-2 stores the weight of y = x W, not y = x W^T
    rules = _rules(*((block + a + "weight", theirs + b + "weight") for a, b in products), transposed=True) + _rules(
        *((block + a + "bias", theirs + b + "bias") for a, b in products),
        ("token_embedding.*", "transformer.wte.*"),
        ("position_embedding.*", "transformer.wpe.*"),
        (block + "norm1.*", theirs + "ln_1.*"),
        (block + "norm2.*", theirs + "ln_2.*"),
        ("decoder.norm.*", "transformer.ln_f.*"),
        ("head.*", "lm_head.*"),
    )
    masks = ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")  # causal masks in old files
    return Layout(rules, "transformer.", {"lm_head.weight": "token_embedding.weight"}, masks)


def _t5_hf(model: torch.nn.Module) -> Layout:
    assert isinstance(model, models.T5)
    gated = any(name.endswith("gate.weight") for name in model.state_dict())
    pairs: list[tuple[str, str | tuple[str, ...]]] = [("token_embedding.*", "shared.*"), ("head.*", "lm_head.*")]
    for stack, network in (("encoder", 1), ("decoder", 2)):
        block, theirs = f"{stack}.layers.*.", f"{stack}.block.*.layer."
        attentions = [("self_attn", theirs + "0.SelfAttention.")]
        if stack == "decoder":
            attentions.append(("multihead_attn", theirs + "1.EncDecAttention."))
        for ours, name in attentions:
            pairs.append((f"{block}{ours}.in_proj_*", (name + "q.*", name + "k.*", name + "v.*")))
            pairs.append((f"{block}{ours}.out_proj.*", name + "o.*"))
        pairs += [(f"{block}norm{i + 1}.*", f"{theirs}{i}.layer_norm.*") for i in range(network + 1)]
        dense = f"{theirs}{network}.DenseReluDense."
        pairs += [
            (block + "linear1.*", dense + ("wi_0.*" if gated else "wi.*")),
            (block + "gate.*", dense + "wi_1.*"),
            (block + "linear2.*", dense + "wo.*"),
            (f"{stack}.norm.*", f"{stack}.final_layer_norm.*"),
            (f"{stack}_bias.embedding.*", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.*"),
        ]
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    unused = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)  # in files of the first T5
    return Layout(_rules(*pairs), tied=dict.fromkeys(copies, "token_embedding.weight"), ignored=unused)


def _clip_block(ours: str, theirs: str, names: tuple[str, ...]) -> tuple[Rule, ...]:
    """A block of CLIP; names: ours of the first norm, the attention, the second norm and the two linear layers."""
    norm1, attention, norm2, linear1, linear2 = (ours + name for name in names)
    projection = theirs + "self_attn."
    return _rules(
        (norm1 + ".*", theirs + "layer_norm1.*"),
        (attention + ".in_proj_*", (projection + "q_proj.*", projection + "k_proj.*", projection + "v_proj.*")),
        (attention + ".out_proj.*", projection + "out_proj.*"),
        (norm2 + ".*", theirs + "layer_norm2.*"),
        (linear1 + ".*", theirs + "mlp.fc1.*"),
        (linear2 + ".*", theirs + "mlp.fc2.*"),
    )


def _clip_hf(model: torch.nn.Module) -> Layout:
    image = (
        _rules(("class_token", "vision_model.embeddings.class_embedding"), squeezed=2)
        + _rules(("encoder.pos_embedding", "vision_model.embeddings.position_embedding.weight"), squeezed=1)
        + _rules(
            ("conv_proj.weight", "vision_model.embeddings.patch_embedding.weight"),
            ("encoder.ln_pre.*", "vision_model.pre_layrnorm.*"),  # their spelling
            ("encoder.ln.*", "vision_model.post_layernorm.*"),
        )
        + _clip_block(
            "encoder.layers.encoder_layer_*.",
            "vision_model.encoder.layers.*.",
            ("ln_1", "self_attention", "ln_2", "mlp.0", "mlp.3"),
        )
    )
    text = _rules(
        ("token_embedding.*", "text_model.embeddings.token_embedding.*"),
        ("position_embedding.*", "text_model.embeddings.position_embedding.*"),
        ("encoder.norm.*", "text_model.final_layer_norm.*"),
    ) + _clip_block(
        "encoder.layers.*.", "text_model.encoder.layers.*.", ("norm1", "self_attn", "norm2", "linear1", "linear2")
    )
    rest = _rules(
        ("image_projection.weight", "visual_projection.weight"),
        ("text_projection.weight", "text_projection.weight"),
        ("logit_scale", "logit_scale"),
    )
    positions = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    return Layout(_under("image_tower.", image) + _under("text_tower.", text) + rest, ignored=positions)


def _clap_hf(model: torch.nn.Module) -> Layout:
    """The text side: their audio tower is a Swin transformer, ours is any module."""
    rules = _under("text_tower.", _bert_rules("text_model.")) + _rules(
        ("text_projection.linear1.*", "text_projection.linear1.*"),
        ("text_projection.linear2.*", "text_projection.linear2.*"),
        ("logit_scale_a", "logit_scale_a"),
        ("logit_scale_t", "logit_scale_t"),
    )
    return Layout(
        rules,
        ignored=(
            "text_model.embeddings.position_ids",
            "text_model.embeddings.token_type_ids",
            "audio_model.**",
            "audio_projection.**",
        ),
        optional=("audio_tower.**", "audio_projection.**", "logit_scale_a", "logit_scale_t"),
    )


# Model -> name of the layout -> what makes it.
_LAYOUTS: dict[type[torch.nn.Module], dict[str, Callable[[torch.nn.Module], Layout]]] = {
    models.AlexNet: {"torchvision": lambda model: NATIVE},
    models.VGG: {"torchvision": lambda model: NATIVE},
    models.GoogLeNet: {"torchvision": lambda model: NATIVE},
    models.ResNet: {"torchvision": lambda model: NATIVE},
    models.ViT: {"torchvision": lambda model: NATIVE, "timm": _vit_timm, "hf": _vit_hf},
    models.Bert: {"hf": _bert_hf},
    models.GPT: {"hf": _gpt_hf},
    models.T5: {"hf": _t5_hf},
    models.CLIP: {"hf": _clip_hf},
    models.CLAP: {"hf": _clap_hf},
}


def layouts_of(model: torch.nn.Module) -> dict[str, Layout]:
    """The layouts of a model by name; "pynn", its own names, is the first and always there."""
    found: dict[str, Layout] = {"pynn": NATIVE}
    for kind, makers in _LAYOUTS.items():
        if isinstance(model, kind):
            found |= {name: make(model) for name, make in makers.items()}
    return found


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether a name is one of the patterns: `*` is one part of it, `**` everything that follows or precedes."""
    return any(
        re.fullmatch(re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", "[^.]+"), name) for pattern in patterns
    )
