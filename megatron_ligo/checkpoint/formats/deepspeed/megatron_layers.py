"""The layers of Megatron-DeepSpeed's pipeline, which are numbered otherwise and have names from before Megatron-core.

Functions between the layers have numbers too, which differ between its versions: a layer's names say what it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_ligo.checkpoint.formats.deepspeed.engine_rank import EngineRank, read_module_state
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import EngineFiles, layer_states_file
from megatron_ligo.checkpoint.formats.megatron_lm import old_names
from megatron_ligo.common.errors import ErrorCollector

ATTENTION, WORDS = "self_attention.", "word_embeddings."
HEADS = ("lm_head.", "output_layer.", "final_linear.")


def has_megatron_layers(files: EngineFiles) -> bool:
    """Returns whether the first layer, which converts the inputs, has no file, and an embedding is the next."""
    layers = sorted({layer for layer, _ in files.layer_states})
    first = files.layer_states.get((layers[0], 0), {}) if layers and layers[0] else {}
    return any(str(name).startswith(WORDS) for name in first)


def read_rank(files: EngineFiles, tp_rank: int, errors: ErrorCollector) -> EngineRank:
    """Reads a tensor-parallel rank's layers by Megatron-core's names; without the optimizer's states."""
    module_state: dict[str, Tensor] = {}
    num_layers = 0
    for layer in sorted({layer for layer, _ in files.layer_states}):
        where = layer_states_file(layer, tp_rank)
        if (layer, tp_rank) not in files.layer_states:
            errors.add(where, "a file", "nothing there", "Fetch it again.")
            continue
        state = read_module_state(files.layer_states[layer, tp_rank], where, errors)
        prefix = _find_prefix(state, num_layers)
        num_layers += prefix.startswith("decoder.layers.")
        for name, tensor in state.items():
            name = next((name.removeprefix(head) for head in HEADS if name.startswith(head)), name)
            module_state[prefix + old_names.modernize(f".{name}")[1:]] = tensor
    return EngineRank(module_state, {name: tuple(tensor.shape) for name, tensor in module_state.items()})


def _find_prefix(state: Mapping[str, Tensor], num_layers: int) -> str:
    """Returns what Megatron-core has before the names of the embedding, a layer, the norm or the head."""
    if any(name.startswith(WORDS) for name in state):
        return "embedding."
    if any(name.startswith(ATTENTION) for name in state):
        return f"decoder.layers.{num_layers}."
    is_head = any(name.startswith(HEADS) for name in state) or any(tensor.dim() == 2 for tensor in state.values())
    return "output_layer." if is_head else "decoder.final_layernorm."
