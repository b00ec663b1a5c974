"""Reads params.json of Meta's Llama releases, and writes one from which Meta's code builds the same model.

    dim, n_layers, n_heads, n_kv_heads, vocab_size (-1: the tokenizer's), multiple_of, ffn_dim_multiplier, norm_eps,
    rope_theta, use_scaled_rope

It states neither the ffn size, which Meta's code computes from the others, nor the context length. `KEYS` has every key
of the releases: those of Llama 4, of quantised and of multimodal models, and of Mistral's files, which have the same
tensors' names, change the network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys, KeyTable, is_same_value
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem

log = logging.getLogger(__name__)

PARAMS = "params.json"
SIZES = ("dim", "n_layers", "n_heads")
OPTIONAL_COUNTS = ("n_kv_heads", "multiple_of", "max_seq_len", "head_dim", "hidden_dim")
KEYS = KeyTable(
    fields={
        "dim": "hidden_size",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "n_kv_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "hidden_dim": "ffn_size",
        "multiple_of": "ffn_size",
        "ffn_dim_multiplier": "ffn_size",
        "vocab_size": "vocab_size",
        "norm_eps": "norm_eps",
        "rope_theta": "rope_base",
        "use_scaled_rope": "rope_scaling",
        "max_seq_len": "max_positions",
        "tied_embeddings": "tied",
    },
    harmless={"max_batch_size": "the size of the cache in Meta's code"},
    fixed={
        # Llama 4.
        **dict.fromkeys(("moe_args", "nope_layer_interval", "attention_chunk_size", "rope_scaling_factor"), (None,)),
        **dict.fromkeys(("rope_high_freq_factor", "ffn_exp", "floor_scale", "attn_scale"), (None,)),
        **dict.fromkeys(("use_qk_norm", "attn_temperature_tuning"), (False, None)),
        # Quantised and fine-tuned Llama 3.2, and Llama 3.2 Vision.
        **dict.fromkeys(("quantization_args", "lora_args", "vision_args"), (None,)),
        **dict.fromkeys(("vision_chunk_size", "vision_num_cross_attention_layers"), (None, -1)),
        "vision_max_num_chunks": (None, 4),
        # Mistral.
        **dict.fromkeys(("sliding_window", "_sliding_window", "attention_window"), (None,)),
        **dict.fromkeys(("moe", "quantization", "lora", "mamba", "yarn", "llama_4_scaling", "vision_encoder"), (None,)),
        "causal": (True, None),
    },
    hints={
        "sliding_window": "Read the model's Hugging Face folder instead.",
        "quantization": "Dequantise the weights first.",
        "quantization_args": "Dequantise the weights first.",
    },
)
# The rope base of Llama 1 and 2, whose files do not state it.
ROPE_BASE = 10000.0
# The constants of scaled rope in Meta's code.
LLAMA31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Context length by rope_theta and use_scaled_rope: Llama 2, Llama 3, Llama 3.1 to 3.3.
CONTEXTS = {(ROPE_BASE, False): 4096, (500000.0, False): 8192, (500000.0, True): 131072}
# Keys that say something only if they are there.
OPTIONAL_AGREEING = ("norm_eps", "head_dim", "hidden_dim", "max_seq_len", "tied_embeddings")
# The largest multiple_of in any release.
COARSEST = 4096
# Far above what any release has (1.3).
LARGEST_MULTIPLIER = 1000


def load_params(path: Path, accepted: AcceptedKeys = NO_KEYS) -> dict:
    """Reads a params.json and checks every key. Raises CheckpointError with all problems."""
    params = config_json.load_config(path)
    errors = ErrorCollector(f"{path} describes a model that this program does not support", CheckpointError)
    KEYS.check(params, accepted, errors)
    for name in (*SIZES, *OPTIONAL_COUNTS):
        value = params.get(name)
        if (value is not None or name in SIZES) and (type(value) is not int or value < 1):
            errors.add(name, "a positive integer", repr(value))
    for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
        value = params.get(name)
        limit = LARGEST_MULTIPLIER if name == "ffn_dim_multiplier" else float("inf")
        if (value is not None or name == "norm_eps") and not (type(value) in (int, float) and 0 < value < limit):
            errors.add(name, "a positive number" + f" below {limit:g}" * math.isfinite(limit), repr(value))
    if type(params.get("vocab_size", -1)) is not int:
        errors.add("vocab_size", "an integer", repr(params["vocab_size"]))
    for name in ("use_scaled_rope", "tied_embeddings"):
        if type(params.get(name, False)) is not bool:
            errors.add(name, "true or false", repr(params[name]))
    errors.raise_if_any()
    if params.get("rope_theta") is None and any(params.get(name) is not None for name in ("head_dim", "hidden_dim")):
        hint = "Mistral's code takes 1000000, Meta's 10000: write what the model was trained with."
        errors.add("rope_theta", "a number in a file of Mistral's form (head_dim, hidden_dim)", "nothing", hint)
        errors.raise_if_any()
    if params["dim"] % params["n_heads"]:
        raise CheckpointError(Problem(f"{path}: dim", f"a multiple of n_heads = {params['n_heads']}", params["dim"]))
    return params


def parse_model_config(params: Mapping, ffn_size: int, vocab_size: int, tied: bool, where: str) -> ModelConfig:
    """Returns the sizes of a release that has only params.json and tensors."""
    base, scaled = float(params.get("rope_theta") or ROPE_BASE), params.get("use_scaled_rope", False)
    try:
        return ModelConfig(
            arch="llama",
            model_type="llama",
            num_layers=params["n_layers"],
            hidden_size=params["dim"],
            ffn_size=ffn_size,
            num_heads=params["n_heads"],
            num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
            head_dim=params["dim"] // params["n_heads"],
            vocab_size=vocab_size,
            max_positions=params.get("max_seq_len") or _context_length(base, scaled, where),
            norm_eps=float(params["norm_eps"]),
            tied=tied,
            rope_base=base,
            rope_scaling=LLAMA31_SCALING if scaled else None,
        )
    except ConfigError as error:
        errors = ErrorCollector(f"{where} does not state the sizes of a model", CheckpointError)
        errors.problems.extend(error.problems)
    errors.raise_if_any()
    raise AssertionError("a refused config states its problems")


def _context_length(base: float, scaled: bool, where: str) -> int:
    hint = "Put the model's Hugging Face config.json beside it, or add max_seq_len."
    if (base, scaled) not in CONTEXTS:
        stated = f"rope_theta {base:g}, use_scaled_rope {scaled}, no max_seq_len"
        raise CheckpointError(Problem(where, "the context length", stated, hint))
    length = CONTEXTS[base, scaled]
    log.warning("%s does not state the context length: assuming %d, which Meta trained with. %s", where, length, hint)
    if scaled:
        log.warning("%s: rotary positions are scaled by 8, as in Meta's code (Llama 3.2's config.json says 32)", where)
    return length


def check_agreement(params: Mapping, model_config: ModelConfig, errors: ErrorCollector) -> None:
    """Adds an error for each size in which a params.json differs from the tensors, or from the config beside it.

    Meta's code scales rotary positions by 8; the config beside it may state another factor, as that of Llama 3.2 does.
    """
    stated = {name: (params[name], KEYS.fields[name]) for name in SIZES}
    stated |= {name: (params[name], KEYS.fields[name]) for name in OPTIONAL_AGREEING if params.get(name) is not None}
    stated["n_kv_heads"] = (params.get("n_kv_heads") or params["n_heads"], "num_kv_heads")
    stated["rope_theta"] = (params.get("rope_theta") or ROPE_BASE, "rope_base")
    if params.get("multiple_of") is not None and params.get("hidden_dim") is None:
        computed = compute_ffn_size(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
        stated["multiple_of, ffn_dim_multiplier"] = (computed, "ffn_size")
    for name, (value, field) in stated.items():
        expected = getattr(model_config, field)
        if not is_same_value(value, expected):
            errors.add(f"{PARAMS}: {name}", f"{field} = {expected}, as the tensors or the config say", value)
    scaled, expected = params.get("use_scaled_rope", False), _is_scaled_as_llama3(model_config)
    if scaled != expected:
        errors.add(f"{PARAMS}: use_scaled_rope", f"{expected}, as the sizes beside it say", scaled)


def _is_scaled_as_llama3(model_config: ModelConfig) -> bool | str:
    """Returns whether use_scaled_rope is true of a model, with any factor: Llama 3.2's is stated nowhere in Meta's
    files. Returns the kind of a scaling that it cannot be."""
    scaling = model_config.rope_scaling
    if scaling is None:
        return False
    return scaling | {"factor": LLAMA31_SCALING["factor"]} == LLAMA31_SCALING or f"scaled as {dict(scaling)}"


def to_params_json(model_config: ModelConfig, vocab_size: int, plain: bool) -> dict:
    """Builds a params.json from which Meta's code builds the model.

    plain: without the keys that the code of Llama 1 and 2 refuses. Raises CheckpointError with everything that the
    format cannot express.
    """
    check_expressible(model_config)
    multiple_of, multiplier = find_ffn_rule(model_config.hidden_size, model_config.ffn_size)
    params = {
        "dim": model_config.hidden_size,
        "n_layers": model_config.num_layers,
        "n_heads": model_config.num_heads,
        "n_kv_heads": model_config.num_kv_heads,
        "vocab_size": vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": model_config.norm_eps,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if plain and model_config.rope_base == ROPE_BASE and model_config.rope_scaling is None:
        return params
    return params | {"rope_theta": model_config.rope_base, "use_scaled_rope": model_config.rope_scaling is not None}


def check_expressible(model_config: ModelConfig) -> None:
    """Raises CheckpointError with everything about a model that Meta's Llama code would compute differently."""
    errors = ErrorCollector("Meta's Llama format cannot express this model", CheckpointError)
    check_parameters(model_config, errors)
    if model_config.sliding_window is not None:
        errors.add("sliding_window", "none", model_config.sliding_window)
    if model_config.rope_layers is not None:
        errors.add("rope_layers", "rotary positions in every layer", list(model_config.rope_layers))
    if model_config.rope_scaling is not None and dict(model_config.rope_scaling) != LLAMA31_SCALING:
        errors.add("rope_scaling", f"none, or {LLAMA31_SCALING} as in Meta's code", dict(model_config.rope_scaling))
    errors.raise_if_any()


def check_parameters(model_config: ModelConfig, errors: ErrorCollector) -> None:
    """Adds an error for parameters that the format has no tensors for."""
    table = architectures.get(model_config.arch)
    missing = [param.key for param in table.params if param.exists(model_config) and "fairscale" not in param.locations]
    if missing:
        errors.add(model_config.model_type, "Llama's parameters only", ", ".join(missing))
    elif model_config.head_dim * model_config.num_heads != model_config.hidden_size:
        errors.add(
            "head_dim",
            f"hidden_size / num_heads = {model_config.hidden_size / model_config.num_heads:g}",
            model_config.head_dim,
        )


def compute_ffn_size(hidden_size: int, multiple_of: int, multiplier: float | None) -> int:
    """Returns the ffn size that Meta's code computes."""
    size = int(2 * (4 * hidden_size) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def find_ffn_rule(hidden_size: int, ffn_size: int) -> tuple[int, float | None]:
    """Finds a multiple_of and the shortest ffn_dim_multiplier (None: none) that give an ffn size."""
    multiples = [number for number in _powers_of_two() if ffn_size % number == 0]
    for multiplier in (None, *_candidate_multipliers(hidden_size, ffn_size)):
        for multiple_of in multiples:
            if compute_ffn_size(hidden_size, multiple_of, multiplier) == ffn_size:
                return multiple_of, multiplier
    raise AssertionError(f"no rule gives an ffn of {ffn_size} at a hidden size of {hidden_size}")


def _powers_of_two() -> Iterator[int]:
    number = COARSEST
    while number:
        yield number
        number //= 2


def _candidate_multipliers(hidden_size: int, ffn_size: int) -> Iterator[float]:
    plain = int(2 * (4 * hidden_size) / 3)
    for digits in range(1, 12):
        # The middle of the range that rounds down to the size.
        yield round((ffn_size + 0.5) / plain, digits)
    yield (ffn_size + 0.5) / plain
