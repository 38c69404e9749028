"""Fused ops, with the arguments of torch.nn.functional plus keyword-only extras."""

from . import _attention_provider
from .additive_attention import additive_attention
from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .cosine_attention import cosine_attention
from .diffusion import diffusion_loss, forward_jump, forward_step, reverse_step
from .group_norm import group_norm
from .group_norm_conv2d import group_norm_conv2d
from .hard_attention import hard_attention
from .layer_norm_lstm import layer_norm_lstm
from .local_attention import local_attention
from .multi_head_attention import multi_head_attention
from .random import normal
from .recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from .rotary_embedding import rotary_embedding
from .scaled_dot_product_attention import scaled_dot_product_attention
from .tree_lstm import Forest, tree_lstm

__all__ = [
    "Forest",
    "additive_attention",
    "conv2d",
    "conv_transpose2d",
    "cosine_attention",
    "diffusion_loss",
    "forward_jump",
    "forward_step",
    "group_norm",
    "group_norm_conv2d",
    "gru",
    "gru_cell",
    "hard_attention",
    "layer_norm_lstm",
    "local_attention",
    "lstm",
    "lstm_cell",
    "multi_head_attention",
    "normal",
    "reverse_step",
    "rnn",
    "rnn_cell",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "tree_lstm",
]

_attention_provider.register()
