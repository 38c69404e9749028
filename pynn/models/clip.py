"""CLIP and CLAP: a tower for images or sounds and one for texts, trained to agree on pairs.

Radford et al., "Learning transferable visual models from natural language supervision",
https://arxiv.org/abs/2103.00020; Wu et al., "Large-scale contrastive language-audio pretraining",
https://arxiv.org/abs/2211.06687. The towers are modules of any kind; here are those of the papers' text sides, and the
spectrogram that turns sound into an image for a ViT.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._transformer import Stack, TransformerBlock, check_tokens, key_mask, normal_init
from .transformer import Bert, BertOutputs

__all__ = ["CLAP", "CLIP", "ContrastiveOutputs", "LogMel", "TextTower"]


class TextTower(nn.Module):
    """CLIP's text encoder: a causal transformer whose last real token stands for the text.

    Args:
        vocab_size: tokens. context_length: longest text. width, layers, heads: of the blocks.
        mlp_width: None for 4 width. activation, eps: see TransformerBlock.
        end_token: the first one in a row is the last real token; None: the highest token of the row is.
    Shape:
        ids (B, L) int64 to (B, width).
    Raises:
        ValueError: ids of another shape or dtype, or longer than context_length; see TransformerBlock.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int = 77,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        mlp_width: int | None = None,
        activation: str = "quick_gelu",
        end_token: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.width, self.context_length, self.end_token = width, context_length, end_token
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context_length, width)
        mlp_width = 4 * width if mlp_width is None else mlp_width
        blocks = [TransformerBlock(width, heads, mlp_width, activation=activation, eps=eps) for _ in range(layers)]
        self.encoder = Stack(blocks, nn.LayerNorm(width, eps))
        normal_init(self)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) tokens to (B, width); attention_mask: (B, L), true where a token takes part; None for all."""
        check_tokens("TextTower", "ids", ids, self.context_length)
        mask = key_mask("TextTower", attention_mask, ids.shape)
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        x = self.encoder(x, mask=mask, is_causal=True)
        last = ids.argmax(1) if self.end_token is None else (ids == self.end_token).int().argmax(1)
        return x[torch.arange(len(ids), device=ids.device), last]


class ContrastiveOutputs(NamedTuple):
    """Similarities of every input of the first tower (rows) with every text (columns), and the other way round."""

    logits: Tensor  # (B, T)
    logits_per_text: Tensor  # (T, B)


class _TwoTowers(nn.Module):
    """Embeddings of two kinds of input in one space, and the loss that pulls pairs together."""

    def _embed(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def _scales(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, inputs: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> ContrastiveOutputs:
        """exp(scale) times the cosine of every input with every text.

        Args:
            inputs: (B, ...), what the first tower takes. ids: (T, L) int64. attention_mask: (T, L).
        """
        ours, texts = self._embed(inputs), self.encode_text(ids, attention_mask)
        scale, text_scale = self._scales()
        cosines = ours @ texts.T
        return ContrastiveOutputs(cosines * scale.exp(), cosines.T * text_scale.exp())

    def loss(self, inputs: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The mean of both cross-entropies: input i belongs to text i, and text i to input i.

        Args:
            inputs: (B, ...). ids: (B, L) int64. attention_mask: (B, L).
        Returns:
            A scalar.
        Raises:
            ValueError: the numbers of inputs and texts differ.
        """
        if len(inputs) != len(ids):
            kind = type(self).__name__
            raise ValueError(f"{kind}.loss: expected a text per input, got {len(inputs)} inputs and {len(ids)} texts")
        outputs = self(inputs, ids, attention_mask)
        target = torch.arange(len(ids), device=ids.device)
        return (F.cross_entropy(outputs.logits, target) + F.cross_entropy(outputs.logits_per_text, target)) / 2


def _tower_width(model: str, name: str, tower: nn.Module, width: int | None) -> int:
    if isinstance(tower, Bert) and tower.pooler is None:
        raise ValueError(f"{model}: expected {name}_tower to be a Bert with pooler=True")
    found = getattr(tower, "width", None) if width is None else width
    if not isinstance(found, int):
        raise ValueError(f"{model}: expected {name}_width, since {type(tower).__name__} has no attribute width")
    return found


def _call_text(tower: nn.Module, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    output = tower(ids) if attention_mask is None else tower(ids, attention_mask)
    if isinstance(output, BertOutputs):
        assert output.pooled is not None  # the constructor asked for a pooler
        return output.pooled
    return output


class CLIP(_TwoTowers):
    """Images and texts in one space.

    Args:
        image_tower: (B, C, H, W) to (B, image_width), for example ViT with num_classes=None.
        text_tower: (B, L) int64, and optionally the attention mask, to (B, text_width), for example TextTower, or a
            Bert with pooler.
        width: of the common space.
        image_width, text_width: of the towers' outputs; None for their attribute `width`.
    Raises:
        ValueError: a tower has no attribute `width` and none is given, or a Bert without pooler.
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        width: int = 512,
        image_width: int | None = None,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower
        image_width = _tower_width("CLIP", "image", image_tower, image_width)
        text_width = _tower_width("CLIP", "text", text_tower, text_width)
        self.image_projection = nn.Linear(image_width, width, bias=False)
        self.text_projection = nn.Linear(text_width, width, bias=False)
        nn.init.normal_(self.image_projection.weight, std=image_width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, width) of norm 1."""
        return F.normalize(self.image_projection(self.image_tower(images)), dim=-1)

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) int64 to (B, width) of norm 1."""
        return F.normalize(self.text_projection(_call_text(self.text_tower, ids, attention_mask)), dim=-1)

    def _embed(self, inputs: Tensor) -> Tensor:
        return self.encode_image(inputs)

    def _scales(self) -> tuple[Tensor, Tensor]:
        return self.logit_scale, self.logit_scale


class _Projection(nn.Module):
    """CLAP's way from a tower into the common space."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class CLAP(_TwoTowers):
    """Sounds and texts in one space; two-layer projections and a scale for each direction.

    Args:
        audio_tower: sounds to (B, audio_width), for example Sequential(LogMel(...), ViT(..., num_classes=None)).
        text_tower: (B, L) int64, and optionally the attention mask, to (B, text_width), or a Bert with pooler.
        width: of the common space.
        audio_width, text_width: of the towers' outputs; None for their attribute `width`.
    Raises:
        ValueError: a tower has no attribute `width` and none is given, or a Bert without pooler.
    """

    def __init__(
        self,
        audio_tower: nn.Module,
        text_tower: nn.Module,
        width: int = 512,
        audio_width: int | None = None,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        self.audio_tower, self.text_tower = audio_tower, text_tower
        self.audio_projection = _Projection(_tower_width("CLAP", "audio", audio_tower, audio_width), width)
        self.text_projection = _Projection(_tower_width("CLAP", "text", text_tower, text_width), width)
        self.logit_scale_a = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_scale_t = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_audio(self, sounds: Tensor) -> Tensor:
        """What the audio tower takes, (B, ...), to (B, width) of norm 1."""
        return F.normalize(self.audio_projection(self.audio_tower(sounds)), dim=-1)

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) int64 to (B, width) of norm 1."""
        return F.normalize(self.text_projection(_call_text(self.text_tower, ids, attention_mask)), dim=-1)

    def _embed(self, inputs: Tensor) -> Tensor:
        return self.encode_audio(inputs)

    def _scales(self) -> tuple[Tensor, Tensor]:
        return self.logit_scale_a, self.logit_scale_t


class LogMel(nn.Module):
    """Sound to the logarithm of its energy in mel bands: a spectrogram that a ViT or CNN reads as an image.

    Frames of `window` seconds every `hop` seconds, Hann window, power spectrum, triangular filters evenly spaced on the
    mel scale m = 2595 log10(1 + f / 700), log(max(energy, floor)). No frame reaches beyond the sound.

    Args:
        sample_rate: samples per second. bands: number of mel bands.
        window, hop: seconds; 25 ms and 10 ms are usual for speech.
        low, high: edges of the lowest and highest band in Hz; None for half the sample rate.
        floor: smallest energy.
    Shape:
        (B, samples) floating to (B, 1, bands, frames), frames = (samples - window) // hop + 1 in samples.
    Raises:
        ValueError: a band edge or length out of range, bands narrower than the spectrum resolves, or a sound of another
            shape or shorter than a frame.
    """

    hann: Tensor
    filters: Tensor

    def __init__(
        self,
        sample_rate: int = 16_000,
        bands: int = 64,
        window: float = 0.025,
        hop: float = 0.010,
        low: float = 20.0,
        high: float | None = None,
        floor: float = 1e-10,
    ) -> None:
        super().__init__()
        high = sample_rate / 2 if high is None else high
        self.window, self.hop, self.floor = round(window * sample_rate), round(hop * sample_rate), floor
        if self.window < 2 or self.hop < 1 or bands < 1 or floor <= 0:
            raise ValueError(
                "LogMel: expected a window of two samples, a hop of one, a band and a positive floor, "
                f"got window={window}, hop={hop}, bands={bands}, floor={floor}"
            )
        if not 0 <= low < high <= sample_rate / 2:
            raise ValueError(f"LogMel: expected 0 <= low < high <= {sample_rate / 2}, got {low} and {high}")
        self.size = 2 ** (self.window - 1).bit_length()  # of the Fourier transform
        edges = torch.linspace(_mel(low), _mel(high), bands + 2, dtype=torch.float64)
        hertz = 700 * (10 ** (edges / 2595) - 1)
        bins = torch.arange(self.size // 2 + 1, dtype=torch.float64) * (sample_rate / self.size)
        left, centre, right = (hertz[i : i + bands, None] for i in range(3))
        filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
        if (filters.sum(1) == 0).any():
            raise ValueError(f"LogMel: {bands} bands are narrower than the {self.size} point spectrum resolves")
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)
        self.register_buffer("filters", filters.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1] < self.window:
            got = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"LogMel: expected floating x of shape (B, samples), samples >= {self.window}, got {got}")
        frames = x.unfold(1, self.window, self.hop) * self.hann.to(x.dtype)  # (B, frames, window)
        power = torch.fft.rfft(frames, self.size).abs().square()  # (B, frames, size / 2 + 1)
        energy = power @ self.filters.to(x.dtype).T
        return energy.clamp(min=self.floor).log().transpose(1, 2).unsqueeze(1)


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)
