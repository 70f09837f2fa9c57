"""transformers' cache for a layer whose attention is experts: it keeps a token's key only where an expert was given it.

Shapes: N stored keys, H head width, m experts per key/value head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from lamella.errors import UserError
from lamella.moe.attention.ragged import Keys

_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # not their subclasses, which hold more than keys and values


class RaggedLayer(CacheLayerMixin):
    """One layer of a `Cache`; to transformers it is as long as the others, whatever it keeps.

    Keys that have left the sliding window are dropped.
    """

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.is_croppable = window is None
        self.seen = 0
        """Tokens per sequence so far."""
        self.num_sequences = 0
        self.stored: Keys | None = None

    def remember(self, new: Keys, num_sequences: int, num_tokens: int) -> Keys:
        """Add the keys of the next `num_tokens` tokens of each sequence.

        Returns:
            all keys that these tokens may see.
        """
        everything = new if self.stored is None else self.stored.followed_by(new)
        self.num_sequences = num_sequences
        self.seen += num_tokens
        self._set(everything)
        if self.window is not None:
            self._set(everything.select(everything.time_N > self.seen - self.window))
        return everything

    def _set(self, stored: Keys | None) -> None:
        self.stored, self.is_initialized = stored, stored is not None
        self.keys, self.values = (None, None) if stored is None else stored[:2]

    @property
    def nbytes(self) -> int:
        """The bytes of the stored keys and values."""
        return 0 if self.stored is None else self.stored.nbytes

    def get_seq_length(self) -> int:
        """The tokens per sequence so far, kept or not."""
        return self.seen

    def get_max_length(self) -> int:
        """The window in tokens, or -1 where there is none."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask's (columns, time of the first one), as transformers' own sliding or growing layer has them."""
        first = 0 if self.window is None else max(self.seen - self.window + 1, 0)
        return self.seen + query_length - first, first

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self._set(None)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (assisted decoding)."""
        if tokens_to_remove and self.window is not None:
            raise UserError("a sliding window has dropped keys that this kind of decoding needs back; use another kind")
        if tokens_to_remove and self.stored is not None:
            self.seen -= abs(tokens_to_remove)
            self._set(self.stored.select(self.stored.time_N < self.seen))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i become what sequence beam_idx[i] was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each sequence be followed by `repeats` - 1 copies of itself."""
        self.batch_select_indices(torch.arange(self.num_sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Sequence i becomes what sequence indices[i] was."""
        if self.stored is None:
            return
        is_of_BN = indices.to(self.stored.sequence_N.device)[:, None] == self.stored.sequence_N
        sequence, row = is_of_BN.nonzero(as_tuple=True)
        self._set(self.stored.select(row)._replace(sequence_N=sequence.int()))
        self.num_sequences = len(indices)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """transformers' hook for keys of all tokens, which this layer does not take."""
        raise NotImplementedError("keys come with the tokens they belong to: see `remember`")

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple:
        """transformers' hook for keys of all tokens, which this layer does not take."""
        raise NotImplementedError("keys come with the tokens they belong to: see `remember`")


def ragged_layer(cache: Cache, index: int, window: int | None) -> RaggedLayer:
    """The cache's layer `index`, put in the place of transformers' own empty one when first asked for.

    Raises:
        UserError: a kind of cache that cannot hold lists of unequal length.
    """
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, RaggedLayer):
        return layer
    if cache.offloading or not isinstance(layer, DynamicLayer) or type(layer) not in _REPLACEABLE:
        raise UserError(
            f"attention experts cannot keep their keys in a {type(layer).__name__}"
            f"{' that is offloaded' if cache.offloading else ''}; leave cache_implementation out"
        )
    if layer.get_seq_length():
        raise UserError("the cache was filled by another model; start with an empty one")
    ragged = RaggedLayer(window)
    cache.layers[index] = ragged
    return ragged
