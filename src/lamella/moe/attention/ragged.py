"""Lists of unequal length in tensors: the keys and values that attention experts keep, and their padded form.

A key (with its value) is stored once per key/value head and token, if any expert of that head was given the token. A
lane is what one expert attends over in one sequence: of the stored keys, those of tokens routed to it, by time.

Shapes: B sequences, E experts, G key/value heads, m = E / G experts per key/value head, N stored keys, H head width,
R rows to be put into lanes, A lanes, P places of the longest lane.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Keys(NamedTuple):
    """Stored keys and values, in the order in which they came (so by time within a sequence and head)."""

    key_NH: Tensor
    """After rope, at the token's own position."""
    value_NH: Tensor
    sequence_N: Tensor
    """int32"""
    head_N: Tensor
    """int32: which key/value head."""
    time_N: Tensor
    """int32: the token's index in its sequence, padding included."""
    chosen_Nm: Tensor
    """bool: which of the head's experts were given the token."""

    def select(self, index: Tensor) -> Keys:
        """The keys at `index`, or where a mask is true."""
        return Keys(*(tensor[index] for tensor in self))

    def followed_by(self, new: Keys) -> Keys:
        """These keys, then the new ones, as one list."""
        return Keys(*(torch.cat(pair) for pair in zip(self, new, strict=True)))

    @property
    def nbytes(self) -> int:
        """The bytes that all of them take."""
        return sum(tensor.nbytes for tensor in self)


class Padded(NamedTuple):
    """Rows as lanes of equal length."""

    index_AP: Tensor
    """int64: which row stands at each place; 0 where none does."""
    filled_AP: Tensor
    """bool"""


def pad(lane_R: Tensor, num_lanes: int) -> Padded:
    """Each lane's rows in their order, then empty places. Waits for the host once, for the longest lane."""
    count_A = torch.bincount(lane_R, minlength=num_lanes)
    order_R = lane_R.argsort(stable=True)
    place_P = torch.arange(int(count_A.max()), device=lane_R.device)
    filled_AP = place_P < count_A[:, None]
    row_AP = (count_A.cumsum(0) - count_A)[:, None] + place_P
    return Padded(order_R[row_AP.where(filled_AP, 0)], filled_AP)


def pad_keys(keys: Keys, lanes_A: Tensor, num_sequences: int) -> Padded:
    """The stored keys of the lanes `lanes_A` (expert * B + sequence, ascending)."""
    m = keys.chosen_Nm.shape[1]
    row_R, expert_R = keys.chosen_Nm.nonzero(as_tuple=True)
    expert_R = keys.head_N[row_R].long() * m + expert_R
    lane_R = expert_R * num_sequences + keys.sequence_N[row_R].long()
    at_R = torch.searchsorted(lanes_A, lane_R).clamp(max=len(lanes_A) - 1)
    wanted_R = lanes_A[at_R] == lane_R
    padded = pad(at_R[wanted_R], len(lanes_A))
    return Padded(row_R[wanted_R][padded.index_AP], padded.filled_AP)
