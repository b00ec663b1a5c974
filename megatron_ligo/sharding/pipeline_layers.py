"""Partition of the network into pipeline layers, and of the layers into stages.

DeepSpeed's pipeline is a list of layers: the word embedding, the embeddings added to it (an image's embedding is one
layer), the transformer layers, the final norm, a masked LM's head transform, the head, and the head's bias.
"""

from __future__ import annotations

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
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
    arch = architectures.get(model_config.arch)
    stack = "encoder" if arch.is_masked_lm else "decoder"
    layers = [{"": f"{stack}.layers.{layer}."} for layer in range(model_config.num_layers)]
    bias = [{"bias": "output_layer.bias"}] if arch.has_bias(Role.HEAD, model_config) else []
    if arch.is_masked_lm:
        norm = [{"norm.": f"{stack}.final_layernorm."}] if arch.has(Role.FINAL_NORM) else []
        head = [{"": "lm_head."}, {"linear.weight": "output_layer.weight"}]
        after = [*norm, *head, *bias]
    else:
        heads = {"linear.": "output_layer.", "patch_linear.": "patch_output_layer."}
        after = [{"norm.": "decoder.final_layernorm."}, heads]
        # An image classifier's head holds its own.
        after += [] if arch.reads_images else bias
    return [*_prefixes_before(model_config), *layers, *after]


def _prefixes_before(model_config: ModelConfig) -> list[dict[str, str]]:
    arch = architectures.get(model_config.arch)
    if arch.reads_images:
        return [{"": "embedding."}]
    words, *others = ("word_embeddings.", "position_embeddings.", "tokentype_embeddings.", "layer_norm.")
    word_layer = {words: f"embedding.{words}"}
    sum_layer = {name: f"embedding.{name}" for name in others}
    return [word_layer, sum_layer] if arch.has_learned_positions or arch.is_masked_lm else [word_layer]
