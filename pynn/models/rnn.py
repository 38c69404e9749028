"""Models on recurrent layers: CharLM, SequenceTagger, SequenceClassifier, Captioner and Seq2Seq.

One to many, many to one, many to many step by step, and many to many of other lengths. Batches come first: token ids
are int64 (B, T). `lengths` (B) are the steps of each row, all of them when None; what lies after them is padding that
no result depends on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.recurrent import GRU, LSTM, RNN
from ..ops.additive_attention import additive_attention

CELLS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
SCORES = ("dot", "additive", "cosine", "mlp")


def check_sizes(model: str, **sizes: int) -> None:
    """Raises ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{model}: expected {name} of at least 1, got {size}")


def check_ids(model: str, name: str, ids: Tensor, rank: int = 2) -> None:
    """Raises ValueError for token ids of another rank or dtype."""
    if ids.dim() != rank or ids.dtype not in (torch.int64, torch.int32):
        shape = "(B, T)" if rank == 2 else "(N)"
        raise ValueError(f"{model}: expected {name} {shape} integers, got {tuple(ids.shape)} {ids.dtype}")


def _recurrent(model: str, cell: str, input_size: int, hidden: int, layers: int = 1, **options: Any) -> nn.Module:
    if cell not in CELLS:
        raise ValueError(f"{model}: expected cell to be one of {', '.join(CELLS)}, got {cell!r}")
    return CELLS[cell](input_size, hidden, layers, batch_first=True, **options)


def _outputs_of(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """h (layers * directions, B, H) of a state, which is a pair (h, c) for LSTM."""
    return state[0] if isinstance(state, tuple) else state


def sample_ids(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draws ids (B) from logits (B, V); the most likely ones at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator).squeeze(1)


class CharLM(nn.Module):
    """A language model: the next token at every position (Graves 2013, arXiv 1308.0850).

    Args:
        vocab: V, number of tokens. hidden: H, width of the state. cell: "rnn", "lstm" or "gru". layers: of the cell.
        embedding: width of a token's vector.
    Raises:
        ValueError: an unknown cell, or sizes below 1.
    """

    def __init__(self, vocab: int, hidden: int, cell: str = "gru", layers: int = 1, embedding: int = 64) -> None:
        super().__init__()
        check_sizes("CharLM", vocab=vocab, hidden=hidden, layers=layers, embedding=embedding)
        self.embedding = nn.Embedding(vocab, embedding)
        self.rnn = _recurrent("CharLM", cell, embedding, hidden, layers)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits of the token after each one.

        Args:
            ids: (B, T). state: what the call on the tokens before returned; zeros when None.
        Returns:
            logits (B, T, V), and the state after the last token: (layers, B, H), a pair (h, c) for LSTM.
        """
        check_ids("CharLM", "ids", ids)
        output, state = self.rnn(self.embedding(ids), state)
        return self.head(output), state

    @torch.inference_mode()
    def generate(
        self, ids: Tensor, length: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continues ids (B, T >= 1) by `length` tokens, one at a time with the state carried on: (B, length).

        Args:
            temperature: divides the logits; 0 takes the most likely token.
        """
        check_ids("CharLM", "ids", ids)
        check_sizes("CharLM", length=length, tokens=ids.shape[1])
        logits, state = self(ids)
        following = [sample_ids(logits[:, -1], temperature, generator)]
        while len(following) < length:
            logits, state = self(following[-1][:, None], state)
            following.append(sample_ids(logits[:, -1], temperature, generator))
        return torch.stack(following, 1)


class SequenceTagger(nn.Module):
    """A class for every token, from what comes before it and, in two directions, after it (Schuster and Paliwal 1997).

    Args:
        vocab: number of tokens. hidden: H of one direction. classes: C. cell: "rnn", "lstm" or "gru".
        bidirectional: whether to read backwards too. layers, embedding: as CharLM's.
    Raises:
        ValueError: an unknown cell, or sizes below 1.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        classes: int,
        cell: str = "lstm",
        bidirectional: bool = True,
        layers: int = 1,
        embedding: int = 64,
    ) -> None:
        super().__init__()
        check_sizes("SequenceTagger", vocab=vocab, hidden=hidden, classes=classes, layers=layers, embedding=embedding)
        self.embedding = nn.Embedding(vocab, embedding)
        self.rnn = _recurrent("SequenceTagger", cell, embedding, hidden, layers, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), classes)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ids (B, T) to logits (B, T, C)."""
        check_ids("SequenceTagger", "ids", ids)
        options = {} if lengths is None else {"lengths": lengths}
        return self.head(self.rnn(self.embedding(ids), **options)[0])


class SequenceClassifier(nn.Module):
    """One class for a whole sequence of vectors, from the last state of each direction.

    Args:
        inputs: I, width of a step. hidden: H of one direction. classes: C. cell: "rnn", "lstm" or "gru".
        bidirectional: whether to read backwards too. layers: of the cell.
    Raises:
        ValueError: an unknown cell, sizes below 1, or input of another shape.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        classes: int,
        cell: str = "lstm",
        bidirectional: bool = False,
        layers: int = 1,
    ) -> None:
        super().__init__()
        check_sizes("SequenceClassifier", inputs=inputs, hidden=hidden, classes=classes, layers=layers)
        self.inputs, self.directions = inputs, 2 if bidirectional else 1
        self.rnn = _recurrent("SequenceClassifier", cell, inputs, hidden, layers, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * self.directions, classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, T, I) to logits (B, C)."""
        if x.dim() != 3 or x.shape[2] != self.inputs:
            raise ValueError(f"SequenceClassifier: expected x of shape (B, T, {self.inputs}), got {tuple(x.shape)}")
        options = {} if lengths is None else {"lengths": lengths}
        _, state = self.rnn(x, **options)
        last = _outputs_of(state)[-self.directions :]  # (directions, B, H) of the last layer
        return self.head(last.transpose(0, 1).flatten(1))


class Captioner(nn.Module):
    """A sentence about a feature vector: one to many (Vinyals et al. 2015, arXiv 1411.4555).

    The features make the state that the language model starts from.

    Args:
        features: F, width of what is described. vocab: V. hidden: H. cell: "rnn", "lstm" or "gru".
        embedding: width of a token's vector.
    Raises:
        ValueError: an unknown cell, sizes below 1, or input of another shape.
    """

    def __init__(self, features: int, vocab: int, hidden: int, cell: str = "gru", embedding: int = 64) -> None:
        super().__init__()
        check_sizes("Captioner", features=features)
        self.start = nn.Linear(features, hidden)
        self.lm = CharLM(vocab, hidden, cell, embedding=embedding)

    def _state(self, features: Tensor) -> Any:
        if features.dim() != 2 or features.shape[1] != self.start.in_features:
            raise ValueError(
                f"Captioner: expected features of shape (B, {self.start.in_features}), got {tuple(features.shape)}"
            )
        h = self.start(features).tanh().unsqueeze(0)  # (1, B, H)
        return (h, torch.zeros_like(h)) if isinstance(self.lm.rnn, LSTM) else h

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of ids (B, T), which begin with the start token."""
        return self.lm(ids, self._state(features))[0]

    @torch.inference_mode()
    def generate(self, features: Tensor, start: int, end: int, max_len: int) -> Tensor:
        """The most likely token after another, from features (B, F): (B, at most max_len), `end` from its first on."""
        check_sizes("Captioner", max_len=max_len)
        state = self._state(features)
        ids = torch.full((len(features),), start, dtype=torch.int64, device=features.device)
        ended = torch.zeros_like(ids, dtype=torch.bool)
        sentence: list[Tensor] = []
        while len(sentence) < max_len and not ended.all():
            logits, state = self.lm(ids[:, None], state)
            ids = logits[:, 0].argmax(-1).masked_fill(ended, end)
            ended |= ids == end
            sentence.append(ids)
        return torch.stack(sentence, 1)


class Alignment(nn.Module):
    """Where each query looks, and what it sees there: softmax over the keys of a score, and the mean of the keys.

    dot         q . k                                        (Luong et al. 2015, arXiv 1508.04025)
    additive    v . tanh(W q + U k + b)                      (Bahdanau et al. 2015, arXiv 1409.0473)
    cosine      s q . k / (|q| |k|), s > 0 learnt            (Graves et al. 2014, arXiv 1410.5401)
    mlp         v . relu(A relu(W q + U k + b) + a)          additive with a second hidden layer

    Args:
        score: one of these. size: H of queries and keys.
    Raises:
        ValueError: an unknown score.
    """

    def __init__(self, score: str, size: int) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"Seq2Seq: expected attention to be None or one of {', '.join(SCORES)}, got {score!r}")
        self.score = score
        if score in ("additive", "mlp"):
            self.query = nn.Linear(size, size)
            self.key = nn.Linear(size, size, bias=False)
            self.value = nn.Linear(size, 1, bias=False)
        if score == "mlp":
            self.hidden = nn.Linear(size, size)
        if score == "cosine":  # a cosine is 1 at most: without a strength the softmax could never choose
            self.log_strength = nn.Parameter(torch.tensor(2.0))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores (B, T, S) of query (B, T, H) and key (B, S, H)."""
        if self.score == "dot":
            return query @ key.mT
        if self.score == "cosine":
            return self.log_strength.exp() * (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT)
        pairs = self.query(query)[:, :, None] + self.key(key)[:, None]  # (B, T, S, H)
        pairs = pairs.tanh() if self.score == "additive" else self.hidden(pairs.relu()).relu()
        return self.value(pairs).squeeze(-1)

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means (B, T, H) of the keys and their weights (B, T, S); where mask (B, S) is False, keys get none."""
        if self.score == "additive":
            seen = None if mask is None else mask[:, None]
            operands = (self.query(query), self.key(key), key, self.value.weight.squeeze(0))
            return additive_attention(*operands, seen, return_weights=True)
        return self.mean(self.scores(query, key), key, mask)

    @staticmethod
    def mean(scores: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same from scores (B, T, S)."""
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        return weights @ key, weights


class Seq2Seq(nn.Module):
    """Encoder and decoder, many to many of any two lengths (Sutskever et al. 2014, arXiv 1409.3215).

    The decoder starts from the last state of the encoder. With attention each of its outputs h_t looks at the outputs
    of the encoder, c_t = sum_s a_ts m_s, and predicts from tanh(W [c_t; h_t]) (Luong et al. 2015, arXiv 1508.04025);
    nothing flows back from c_t, so with given targets all steps are computed at once.

    Args:
        src_vocab: number of source tokens. tgt_vocab: V, of target tokens. hidden: H.
        attention: None, or a score of `Alignment`: "dot", "additive", "cosine", "mlp".
        cell: "rnn", "lstm" or "gru". start: target token that every target begins after. embedding: of a token.
    Raises:
        ValueError: an unknown attention or cell, sizes below 1, or neither tgt nor max_len.
    """

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        hidden: int,
        attention: str | None = None,
        cell: str = "gru",
        start: int = 0,
        embedding: int = 64,
    ) -> None:
        super().__init__()
        check_sizes("Seq2Seq", src_vocab=src_vocab, tgt_vocab=tgt_vocab, hidden=hidden, embedding=embedding)
        if not 0 <= start < tgt_vocab:
            raise ValueError(f"Seq2Seq: expected start from 0 to {tgt_vocab - 1}, got {start}")
        self.start = start
        self.src_embedding = nn.Embedding(src_vocab, embedding)
        self.encoder = _recurrent("Seq2Seq", cell, embedding, hidden)
        self.tgt_embedding = nn.Embedding(tgt_vocab, embedding)
        self.decoder = _recurrent("Seq2Seq", cell, embedding, hidden)
        self.alignment = None if attention is None else Alignment(attention, hidden)
        self.combine = None if attention is None else nn.Linear(2 * hidden, hidden)
        self.head = nn.Linear(hidden, tgt_vocab)

    def forward(
        self, src: Tensor, tgt: Tensor | None = None, max_len: int | None = None, src_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the target, from the given one (teacher forcing) or from the model's own most likely tokens.

        Args:
            src: (B, S). tgt: (B, T), without the start token. max_len: T when there is no tgt.
            src_lengths: (B), steps of each source.
        Returns:
            logits (B, T, V), and the weights (B, T, S) of the attention, None without one.
        """
        check_ids("Seq2Seq", "src", src)
        if (tgt is None) == (max_len is None):
            raise ValueError("Seq2Seq: expected either tgt or max_len")
        options = {} if src_lengths is None else {"lengths": src_lengths}
        memory, state = self.encoder(self.src_embedding(src), **options)  # (B, S, H)
        mask = None
        if src_lengths is not None:
            mask = torch.arange(src.shape[1], device=src.device) < src_lengths.to(src.device)[:, None]
        first = torch.full((len(src), 1), self.start, dtype=torch.int64, device=src.device)
        if tgt is not None:
            check_ids("Seq2Seq", "tgt", tgt)
            if len(tgt) != len(src):
                raise ValueError(f"Seq2Seq: expected tgt with the {len(src)} rows of src, got {len(tgt)}")
            return self._decode(torch.cat((first, tgt[:, :-1]), 1), memory, mask, state)[:2]
        assert max_len is not None
        check_sizes("Seq2Seq", max_len=max_len)
        ids, steps = first, []
        for _ in range(max_len):
            logits, weights, state = self._decode(ids, memory, mask, state)
            ids = logits.argmax(-1)
            steps.append((logits, weights))
        logits = torch.cat([step[0] for step in steps], 1)
        return logits, None if self.alignment is None else torch.cat([step[1] for step in steps], 1)

    def _decode(self, ids: Tensor, memory: Tensor, mask: Tensor | None, state: Any) -> tuple[Tensor, Any, Any]:
        output, state = self.decoder(self.tgt_embedding(ids), state)  # (B, T, H)
        weights = None
        if self.alignment is not None and self.combine is not None:
            context, weights = self.alignment(output, memory, mask)
            output = self.combine(torch.cat((context, output), -1)).tanh()
        return self.head(output), weights, state
