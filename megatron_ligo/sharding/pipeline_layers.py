"""Partition of the network into pipeline layers, and of the layers into stages.

DeepSpeed's pipeline is a list of layers: the word embedding, the embeddings added to it (an image's embedding is one
layer), the transformer layers, the final norm (masked LM: the head's transform), the head, and a masked LM's head bias.
"""

from __future__ import annotations

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import LayoutError


def stage_bounds(num_layers: int, pp: int) -> list[int]:
    """Returns the first transformer layer of each pipeline stage, then the number of layers: pp + 1 numbers.

    Stages differ by one layer at most. LayoutError if there are fewer layers than stages.
    """
    if pp > num_layers:
        raise LayoutError(
            f"pp = {pp}: expected at most one stage a layer, found {num_layers} layers. Choose a smaller pp."
        )
    return [stage * num_layers // pp for stage in range(pp + 1)]


def num_layers_before(model_config: ModelConfig) -> int:
    """Returns the number of pipeline layers before the first transformer layer."""
    return len(_prefixes_before(model_config))


def layer_prefixes(model_config: ModelConfig) -> list[dict[str, str]]:
    """Returns {prefix of a parameter's name in the layer: its prefix in the whole model} for each pipeline layer."""
    masked = architectures.get(model_config.arch).is_masked_lm
    stack = "encoder" if masked else "decoder"
    layers = [{"": f"{stack}.layers.{layer}."} for layer in range(model_config.num_layers)]
    if masked:
        after = [{"": "lm_head."}, {"linear.weight": "output_layer.weight"}, {"bias": "output_layer.bias"}]
    else:
        after = [{"norm.": "decoder.final_layernorm."}, {"linear.": "output_layer."}]
    return [*_prefixes_before(model_config), *layers, *after]


def _prefixes_before(model_config: ModelConfig) -> list[dict[str, str]]:
    arch = architectures.get(model_config.arch)
    if arch.reads_images:
        return [{"": "embedding."}]
    words, *others = ("word_embeddings.", "position_embeddings.", "tokentype_embeddings.", "layer_norm.")
    word_layer = {words: f"embedding.{words}"}
    sum_layer = {name: f"embedding.{name}" for name in others}
    return [word_layer, sum_layer] if arch.has_learned_positions else [word_layer]
