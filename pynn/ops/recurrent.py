"""LSTM, GRU and the plain RNN over whole sequences and single steps."""

from . import _recurrent_schemas  # noqa: F401
