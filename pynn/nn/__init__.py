"""torch.nn-compatible layers on pynn kernels: the same constructors, state_dict names and errors."""

from .attention import MultiheadAttention
from .conv import Conv2d, ConvTranspose2d
from .key_value_cache import KeyValueCache
from .layer_norm_lstm import LayerNormLSTM
from .normalization import GroupNorm
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .tree import TreeLSTM

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv2d",
    "ConvTranspose2d",
    "GRUCell",
    "GroupNorm",
    "KeyValueCache",
    "LSTMCell",
    "LayerNormLSTM",
    "MultiheadAttention",
    "RNNCell",
    "TreeLSTM",
]
