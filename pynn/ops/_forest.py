"""Forest: trees in the numbering that tree_lstm works in."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Forest:
    """Trees, their nodes numbered level by level from the leaves; make one with `Forest.from_parents`.

    Attributes:
        order: (N) int64, the caller's number of each node. place: (N) int64, the inverse: where a caller's node is.
        child_offsets: (N + 1), children: (N - roots) int64: the children of node n are
            children[child_offsets[n] : child_offsets[n + 1]].
        levels: numbers of the first node of each level, and N.
    """

    order: Tensor
    place: Tensor
    child_offsets: Tensor
    children: Tensor
    levels: tuple[int, ...]

    @classmethod
    def from_parents(cls, parents: Tensor, device: torch.device | str | None = None) -> Forest:
        """The forest in which node n is a child of parents[n].

        Args:
            parents: (N) integers: the parent of each node, -1 for a root, in any order.
            device: where the result is needed; parents' own by default.
        Raises:
            ValueError: parents is not such a tensor, or goes in a circle.
        """
        if parents.dim() != 1 or parents.is_floating_point() or parents.dtype == torch.bool:
            raise ValueError(f"Forest: expected parents to be (N) integers, got {list(parents.shape)} {parents.dtype}")
        of = parents.tolist()
        if any(not -1 <= parent < len(of) for parent in of):
            raise ValueError(f"Forest: expected parents from -1 to {len(of) - 1}, got {min(of)} to {max(of)}")
        missing = [0] * len(of)  # children without a level
        for parent in of:
            if parent >= 0:
                missing[parent] += 1
        level = [n for n, count in enumerate(missing) if count == 0]
        order, levels = [], [0]
        while level:
            order += level
            levels.append(len(order))
            following = []
            for n in level:
                if (parent := of[n]) >= 0:
                    missing[parent] -= 1
                    if missing[parent] == 0:
                        following.append(parent)
            level = following
        if len(order) < len(of):
            raise ValueError("Forest: expected trees, got parents that go in a circle")
        numbers = torch.tensor(order, dtype=torch.int64)
        place = torch.empty_like(numbers)
        place[numbers] = torch.arange(len(of))
        up = torch.tensor([of[n] for n in order], dtype=torch.int64)
        places = torch.where(up < 0, len(of), place[up.clamp(min=0)]) if of else up
        children = torch.argsort(places, stable=True)[: int((up >= 0).sum())]
        counts = torch.bincount(places, minlength=len(of) + 1)[: len(of)]
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        device = parents.device if device is None else device
        order_, place, offsets, children = (t.to(device) for t in (numbers, place, offsets, children))
        return cls(order_, place, offsets, children, tuple(levels))
