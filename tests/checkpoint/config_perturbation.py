"""Changes one key of a config.json after another, and compares transformers' logits of it with those of our reading.

Theirs: the class loads the folder with the changed config. Ours: the reader's `ModelConfig`, written as a config of its
own without any key of the source, with the tensors that it read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.hf.config_keys import key_table
from megatron_ligo.checkpoint.formats.hf.format import HfReader
from megatron_ligo.common.errors import CheckpointError
from tests import layer_norm_models
from tests.checkpoint.library_refusals import check_raised_by_library
from tests.checkpoint.perturbed_decoders import DECODERS
from tests.checkpoint.perturbed_encoders import ENCODERS

# model_type, with what is special about the model -> the class, and the config that is changed.
MODELS = {**DECODERS, **ENCODERS}
# Keys that transformers reads without declaring them, that old or other families' configs have, or that nobody has.
UNDECLARED = (
    "is_causal", "sliding_window", "attention_chunk_size", "kv_sharing_modes", "layer_types", "head_dim", "num_heads",
    "text_config", "decoder", "generator", "gguf_file", "transformers_weights", "fusion_config", "mlp_layer_types",
    "mtp_layer_types", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "default_theta",
    "default_rope_type", "ignore_keys_at_rope_validation", "_rope_type_labels", "sub_configs", "attribute_map",
    "base_model_tp_plan", "per_layer_config", "quantization_config", "vision_feature_layer", "position_embedding_type",
    "num_key_value_heads", "attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers", "no_rope_layers",
    "logits_scaling", "residual_multiplier", "embedding_multiplier", "attention_multiplier", "use_bias", "qk_norm",
    "rope_interleaved", "use_mrope", "pretraining_tp", "pruned_heads", "is_decoder", "add_cross_attention",
    "tie_encoder_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward", "n_ctx", "rotary_dim",
    "use_parallel_residual", "rotary_pct", "rotary_emb_base", "hidden_size", "num_hidden_layers", "n_embd", "n_layer",
    "num_attention_heads", "max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings",
    "torchscript", "output_attentions", "attn_implementation", "classifier_dropout", "num_labels", "a_new_key",
)  # fmt: skip
REMOVED = "<removed>"
STRINGS = {
    "hidden_act": [
        "gelu",
        "relu",
        "silu",
        "swish",
        "gelu_new",
        "gelu_fast",
        "gelu_python",
        "relu2",
        "quick_gelu",
        "mish",
        "x",
    ],
    "position_embedding_type": ["relative_key", "absolute"],
    "dtype": ["bfloat16", "float16"],
    "pooler_act": ["relu"],
    "attn_implementation": ["eager"],
}
STRINGS["hidden_activation"] = STRINGS["hidden_act"]
STRINGS["activation_function"] = STRINGS["hidden_act"]
SCALINGS = (
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 500.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "longrope", "short_factor": [1.5], "long_factor": [2.0], "original_max_position_embeddings": 16},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "default"},
    {},
)  # fmt: skip
LISTS = {
    "layer_types": [
        ["full_attention"] * 2, ["sliding_attention"] * 2, ["sliding_attention", "full_attention"], ["full_attention"],
        ["chunked_attention"] * 2, ["chunked_attention", "full_attention"], [],
    ],
    "no_rope_layers": [[0, 1], [1, 1], [0, 0], [1, 0, 1], [1]],
    "moe_layers": [[0], [1], [7], ["0"]],
    "layer_rope_theta": [[500.0, 500.0], [0, 500.0], [50.0, 50.0], [50.0, 500.0], [0, 0], [500.0]],
    "rope_parameters": list(SCALINGS),
    "rope_scaling": list(SCALINGS),
    "per_layer_config": [{"1": {"intermediate_size": 12}}, {"0": {"sliding_window": 3}}, {"1": {"skip": ["mlp"]}}, {}],
    "architectures": [["GraniteForCausalLM"], ["BertForMaskedLM"], []],
    "image_size": [[12, 12], [12, 9], [12]],
    "patch_size": [[3, 3], [3, 4]],
    "id2label": [{"0": "a"}, {str(number): "b" for number in range(5)}],
}  # fmt: skip
NUMBERS = (None, False, True, 0, 1, 2, 8, 0.5, -1, "", "x", [], [0], {})
TOLERANCE = 1e-5


@dataclass
class Report:
    """What a run found: counts by outcome, and a line for each change that is worth reading."""

    outcomes: Counter = field(default_factory=Counter)
    silent: list[str] = field(default_factory=list)
    lenient: list[str] = field(default_factory=list)


class Perturbation:
    """One model of a family in a folder, whose config is changed."""

    def __init__(self, model_type: str, folder: Path):
        name, config = MODELS[model_type]
        model_type = model_type.partition(" ")[0]
        self.model_type, self.folder, self.table = model_type, folder, key_table(model_type)
        self.network_class = getattr(transformers, name)
        torch.manual_seed(0)
        network = layer_norm_models._random(self.network_class(CONFIG_MAPPING[model_type](**config)).eval())
        network.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        self.config = saved | config if "num_labels" not in config else saved
        generator = torch.Generator().manual_seed(1)
        if "image_size" in config:
            self.inputs = torch.randn(2, config["num_channels"], 12, 12, generator=generator)
        else:
            self.inputs = torch.randint(3, 37, (2, 24), generator=generator)
        self.is_causal = "Causal" in name or "LMHead" in name
        self.base = self.theirs(self.config)
        assert self.base is not None
        assert self.ours(self.config) is not None

    def keys(self) -> list[str]:
        """Returns every key to change: those of the file, of the class, of the table, and undeclared ones."""
        declared = CONFIG_MAPPING[self.model_type]().to_dict()
        names = {*self.config, *declared, *self.table.fields, *self.table.harmless, *self.table.fixed, *UNDECLARED}
        return sorted(names - {"model_type"})

    def values(self, key: str) -> Iterator[object]:
        """Yields the values to give to a key: a few if the table calls it harmless, and all kinds if not."""
        yield REMOVED
        yield from LISTS.get(key, ())
        yield from STRINGS.get(key, ())
        if key in self.table.harmless:
            yield from (None, True, 3, "x")
            return
        yield from NUMBERS
        value = self.config.get(key)
        if type(value) in (int, float):
            yield from (value + 1, value * 2, value / 2, str(value))
        elif isinstance(value, bool):
            yield from (not value, int(not value), str(value).lower())

    def another_value(self, key: str) -> object:
        """Returns one other value for a key: of the same type, if it has a value."""
        value = self.config.get(key)
        if isinstance(value, bool):
            return not value
        if type(value) in (int, float):
            return value * 2
        return LISTS[key][0] if key in LISTS else STRINGS[key][1] if len(STRINGS.get(key, ())) > 1 else 2

    def theirs(self, config: Mapping) -> Tensor | None:
        """Returns transformers' logits of the folder with a config; None if it does not load the weights."""
        self._write(config)
        try:
            network, report = self.network_class.from_pretrained(
                self.folder, dtype=torch.float32, output_loading_info=True
            )
            if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
                return None
            return self._run(network)
        except Exception as error:
            check_raised_by_library(error)
            return None

    def ours(self, config: Mapping) -> Tensor | None:
        """Returns the logits of our reading: none at all if the network does not run; None if it is refused."""
        self._write(config)
        try:
            network = layer_norm_models.built(HfReader(self.folder))
        except CheckpointError:
            return None
        try:
            return self._run(network)
        except (RuntimeError, ValueError, LookupError):
            return torch.empty(0)

    def check(self, key: str, value: object, report: Report) -> None:
        """Makes one change and records its outcome."""
        config = {name: old for name, old in self.config.items() if name != key}
        if value is not REMOVED:
            config[key] = value
        elif key not in self.config:
            return
        line = f"{self.model_type}: {key} = {value!r} (was {self.config.get(key, REMOVED)!r})"
        theirs, ours = self.theirs(config), self.ours(config)
        moved = theirs is None or theirs.shape != self.base.shape or distance(theirs, self.base) > TOLERANCE
        if ours is None:
            outcome = "refused by both" if theirs is None else "moved, refused" if moved else "harmless, refused"
        elif theirs is None:
            outcome = "only transformers refuses"
            if key in self.table.fields or key in self.table.fixed:
                report.lenient.append(line)
        elif ours.shape == theirs.shape and distance(ours, theirs) <= TOLERANCE:
            outcome = "moved equally" if moved else "harmless"
        else:
            outcome = "SILENT"
            report.silent.append(
                f"{line}: {distance(theirs, ours):.3g} at a scale of {float(self.base.abs().max()):.3g}"
            )
        report.outcomes[outcome] += 1

    @torch.no_grad()
    def _run(self, network: torch.nn.Module) -> Tensor:
        """Returns logits; of a causal model also those of the last tokens, computed with a cache of the first."""
        network.eval()
        whole = network(self.inputs, return_dict=True)["logits"]
        if not self.is_causal:
            return whole
        first = network(self.inputs[:, :-4], use_cache=True, return_dict=True)
        last = network(self.inputs[:, -4:], past_key_values=first["past_key_values"], use_cache=True, return_dict=True)
        return torch.cat([whole, last["logits"]], dim=1)

    def _write(self, config: Mapping) -> None:
        path = self.folder / config_json.CONFIG
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(config))
        scratch.replace(path)


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference of two tensors of one shape, relative to the scale of the second."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))
