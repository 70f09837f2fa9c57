"""A dense or converted model, one decoder layer in memory at a time, in float32, computed by transformers' own classes.

The model is built without storage; only norms and learned positions are filled for good. What the model would hand to
a layer (masks, rotary embeddings, positions) is found by running the model with recorders in place of its layers.

Shapes: B windows, L tokens per window, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lamella.architecture.converted import is_converted
from lamella.calibrate.anatomy import LayerFFN, anatomy_of, read_whole
from lamella.calibrate.sample import FFN
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor
from lamella.errors import UserError
from lamella.jsons import Json


class LayerInput(NamedTuple):
    """What the model calls a layer with."""

    hidden_BLD: Tensor
    args: tuple[object, ...]
    kwargs: dict[str, object]


class _Recorder(nn.Module):
    """Stands for a layer: keeps its input and passes it on."""

    def forward(self, hidden_BLD: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.seen = LayerInput(hidden_BLD, args, kwargs)
        return hidden_BLD


class _Given(nn.Module):
    """Stands for the decoder: what it is given comes out."""

    def forward(
        self, *args: object, inputs_embeds: Tensor, **kwargs: object
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class LayerwiseModel:
    """Layers, embedding and head of a checkpoint, each read when it is asked for."""

    def __init__(self, source: Checkpoint, keep_bfloat16: bool = False):
        """`keep_bfloat16`: a layer's matrices that are stored in bfloat16 stay so; its caller computes with autocast,
        which leaves norms and residual stream in float32."""
        self._keep_bfloat16 = keep_bfloat16
        self.anatomy, self._tensors, self._source_config = anatomy_of(source.config), source.tensors, source.config
        self.config: Any = config_of(source)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        model.eval().requires_grad_(False)
        self._decoder = model.get_decoder()
        names = {id(module): f"{name}." for name, module in model.named_modules()}
        self._layers = list(getattr(self._decoder, self.anatomy.modules.layers))
        self._prefixes = [names[id(layer)] for layer in self._layers]
        self._embedding = self._tensors[names[id(model.get_input_embeddings())] + "weight"]
        # Gemma's embedding multiplies by itself; elsewhere the model does
        self._embedding_scale = float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
        self._head = self._embedding if self.config.tie_word_embeddings else self._tensors["lm_head.weight"]
        place = names[id(self._decoder)]
        self._fill_decoder(place)
        self._behind_layers = self._between_layers_and_head()
        self._model, self._lm_head = model, model.get_output_embeddings()
        model.set_submodule(place.removesuffix("."), _Given())

    def _fill_decoder(self, prefix: str) -> None:
        """Recorders for the layers, weights for what is left; the embedding stays without storage."""
        decoder, count = self._decoder, len(self._layers)
        setattr(decoder, self.anatomy.modules.layers, nn.ModuleList(_Recorder() for _ in range(count)))
        for name, parameter in list(decoder.named_parameters()):
            if prefix + name != self._embedding.name:
                module, _, leaf = name.rpartition(".")
                value = read_whole(self._tensors[prefix + name]).view_as(parameter)
                setattr(decoder.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
        frequencies = {name.rpartition(".")[0] for name, _ in decoder.named_buffers() if name.endswith("inv_freq")}
        for name in frequencies:  # computed from a config, which may be that of some layers alone, and not stored
            module = decoder.get_submodule(name)
            decoder.set_submodule(name, type(module)(module.config))

    def _between_layers_and_head(self) -> list[nn.Module]:
        """The last layer's norm if layers end with one; the decoder's, and its projection to the embedding's width."""
        post_norm = self.anatomy.post_norm
        last = None if post_norm is None else self._post_norm(self.num_layers - 1, post_norm)
        own = [getattr(self._decoder, name, None) for name in (self.anatomy.modules.final_norm, "project_out")]
        return [module for module in (last, *own) if module is not None]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def width(self) -> int:
        """D"""
        return self.config.hidden_size

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its weights; memory is free again when the caller lets go of it.

        One that ends with a norm ends before it here, and begins with the norm of the layer before.
        """
        layer, post_norm = self._with_weights(self._layers[index], self._prefixes[index]), self.anatomy.post_norm
        if post_norm is not None:
            setattr(layer, post_norm, nn.Identity())
            if index > 0:
                norm = self._post_norm(index - 1, post_norm)
                layer.register_forward_pre_hook(lambda _, args: (norm(args[0]), *args[1:]))
        return layer

    def _post_norm(self, index: int, name: str) -> nn.Module:
        """The norm that a layer ends with, in the checkpoint."""
        return self._with_weights(getattr(self._layers[index], name), f"{self._prefixes[index]}{name}.")

    def _with_weights(self, module: nn.Module, prefix: str) -> nn.Module:
        """A copy of a module without storage, with the checkpoint's tensors of this prefix; UserError for damage."""
        module = copy.deepcopy(module)
        weights = {name: self._weight(self._tensors[prefix + name]) for name in module.state_dict()}
        for name, weight in weights.items():
            if not torch.stack(weight.aminmax()).isfinite().all():  # one pass: NaN is the least and the greatest
                raise UserError(f"{prefix}{name} holds NaN or infinite values; the checkpoint is damaged")
        module.load_state_dict(weights, assign=True)
        return module.requires_grad_(False)

    def _weight(self, tensor: SourceTensor) -> Tensor:
        if self._keep_bfloat16 and tensor.dtype == "BF16" and len(tensor.shape) > 1:
            return tensor.read(0, tensor.numel).view(tensor.shape)
        return read_whole(tensor)

    def ffn(self, index: int) -> FFN:
        """A layer's FFN alone, float32."""
        return self.ffn_modules(index).read(self._tensors)

    def ffn_modules(self, index: int) -> LayerFFN:
        """The modules of that layer's FFN."""
        return LayerFFN(self._source_config, index, self._prefixes[index])

    def embed(self, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """What the model gives its first layer [B, L, D]; UserError for a token beyond the vocabulary."""
        vocabulary, width = self._embedding.shape
        ids_U, inverse_BL = ids_BL.unique(return_inverse=True)
        if ids_U[-1] >= vocabulary:
            raise UserError(f"the tokenizer gives token {int(ids_U[-1])}, but the model has {vocabulary}: not its own")
        rows_UD = torch.stack([self._embedding.read(row * width, width) for row in ids_U.tolist()]).float()
        rows_UD = rows_UD * self._embedding_scale
        return self._run(rows_UD[inverse_BL], positions_BL)[0].hidden_BLD

    def call(self, index: int, positions_BL: Tensor) -> tuple[tuple[object, ...], dict[str, object]]:
        """Arguments, after the hidden states, with which the model calls a layer on windows with these positions."""
        nothing_BLD = torch.zeros(1).expand(*positions_BL.shape, self._embedding.shape[1])
        seen = self._run(nothing_BLD, positions_BL)[index]
        return seen.args, seen.kwargs

    @torch.no_grad()
    def _run(self, embedding_BLD: Tensor, positions_BL: Tensor) -> list[LayerInput]:
        mask = None if self.anatomy.modules.masks_documents else document_mask(positions_BL)
        self._decoder(inputs_embeds=embedding_BLD, position_ids=positions_BL, attention_mask=mask, use_cache=False)
        return [recorder.seen for recorder in getattr(self._decoder, self.anatomy.modules.layers)]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """All that lies between the last layer and the head."""
        for module in self._behind_layers:
            hidden = module(hidden)
        return hidden

    def head_VD(self) -> Tensor:
        """The output head, or the embedding where they are tied; float32."""
        return read_whole(self._head)

    def logits(self, hidden_tD: Tensor, head_VD: Tensor) -> Tensor:
        """[t, V] of the last layer's output, as the model itself makes them: some scale or cap them."""
        self._lm_head.weight = nn.Parameter(head_VD, requires_grad=False)
        return self._model(inputs_embeds=self.final_norm(hidden_tD)[None], use_cache=False).logits[0]


def config_of(source: Checkpoint) -> PreTrainedConfig:
    """The checkpoint's config as transformers reads it, with the names that all families share."""
    anatomy_of(source.config)  # a family that is known
    if is_converted(source.config):
        import lamella.hf.models  # noqa: F401  registers the converted models
    return CONFIG_MAPPING[source.config["model_type"]].from_dict(source.config)


def model_fingerprint(source: Checkpoint) -> Json:
    """What tells a model from others without reading it: its weight files (names, sizes, times) and its config."""
    stats = {tensor.path: tensor.path.stat() for tensor in source.tensors.values()}
    files = {path.name: [stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats.items())}
    return {"files": files, "config": source.config}


def document_mask(positions_BL: Tensor) -> Tensor:
    """bool [B, 1, L, L]: a token sees itself and the earlier ones of its document."""
    document_BL = (positions_BL == 0).cumsum(dim=1)
    same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    return same_BLL.tril()[:, None]
