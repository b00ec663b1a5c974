"""params.json of Meta's Llama releases: the sizes that it states, and one that Meta's own code builds a model from.

    dim, n_layers, n_heads, n_kv_heads, vocab_size (-1: ask the tokenizer), multiple_of, ffn_dim_multiplier, norm_eps,
    rope_theta, use_scaled_rope

The ffn size is not among them: Meta's code computes it from the others. Nor is the length of the context.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem, did_you_mean

log = logging.getLogger(__name__)

PARAMS = "params.json"
SIZES = ("dim", "n_layers", "n_heads")
OPTIONAL = (
    "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "max_seq_len",
)  # fmt: skip
# Changes nothing in the network.
IGNORED = ("max_batch_size",)
# What Llama 1 and 2, whose files do not state it, turn by.
ROPE_BASE = 10000.0
# Meta's code has these numbers in it.
LLAMA31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Tokens of context that Meta trained for, by rope_theta and use_scaled_rope: Llama 2, Llama 3, Llama 3.1 to 3.3.
CONTEXTS = {(ROPE_BASE, False): 4096, (500000.0, False): 8192, (500000.0, True): 131072}
# The largest multiple_of in a release.
COARSEST = 4096


def load_params(path: Path) -> dict:
    """The keys of a params.json, checked one by one."""
    params = config_json.load_config(path)
    errors = ErrorCollector(f"{path} describes a network that this program cannot hold", CheckpointError)
    known = (*SIZES, "norm_eps", *OPTIONAL, *IGNORED)
    for name in params:
        if name not in known:
            errors.add_message(
                f"unknown key {name!r}: the network may compute something else. {did_you_mean(name, known)}"
            )
    for name in (*SIZES, "n_kv_heads", "max_seq_len"):
        value = params.get(name)
        if (value is not None or name in SIZES) and (type(value) is not int or value < 1):
            errors.add(name, "a positive integer", repr(value))
    for name in ("norm_eps", "rope_theta"):
        value = params.get(name)
        if (value is not None or name == "norm_eps") and not (type(value) in (int, float) and 0 < value < float("inf")):
            errors.add(name, "a positive number", repr(value))
    if type(params.get("vocab_size", -1)) is not int:
        errors.add("vocab_size", "an integer", repr(params["vocab_size"]))
    if type(params.get("use_scaled_rope", False)) is not bool:
        errors.add("use_scaled_rope", "true or false", repr(params["use_scaled_rope"]))
    errors.raise_if_any()
    if params["dim"] % params["n_heads"]:
        raise CheckpointError(Problem(f"{path}: dim", f"a multiple of n_heads = {params['n_heads']}", params["dim"]))
    return params


def parse_model_config(params: Mapping, ffn_size: int, vocab_size: int, tied: bool, where: str) -> ModelConfig:
    """The sizes of a release that nothing but its params.json and its tensors state."""
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
        raise CheckpointError(f"{where}: {error}") from None


def _context_length(base: float, scaled: bool, where: str) -> int:
    hint = "Put the model's Hugging Face config.json beside it, or add max_seq_len to it."
    if (base, scaled) not in CONTEXTS:
        found = f"rope_theta {base:g}, use_scaled_rope {scaled}, and no max_seq_len"
        raise CheckpointError(Problem(where, "what says how long the context is", found, hint))
    length = CONTEXTS[base, scaled]
    log.warning("%s does not say how long the context is: taken as %d, as Meta trained for. %s", where, length, hint)
    if scaled:
        log.warning("%s: rotary positions scaled by 8, as Meta's code does (Llama 3.2's config.json says 32)", where)
    return length


def check_agreement(params: Mapping, model_config: ModelConfig, errors: ErrorCollector) -> None:
    """Adds a fault for everything in which a params.json and the sizes stated beside it differ."""
    stated = {
        "dim": (params["dim"], model_config.hidden_size),
        "n_layers": (params["n_layers"], model_config.num_layers),
        "n_heads": (params["n_heads"], model_config.num_heads),
        "n_kv_heads": (params.get("n_kv_heads") or params["n_heads"], model_config.num_kv_heads),
        "norm_eps": (params["norm_eps"], model_config.norm_eps),
        "rope_theta": (params.get("rope_theta") or ROPE_BASE, model_config.rope_base),
        "use_scaled_rope": (params.get("use_scaled_rope", False), model_config.rope_scaling is not None),
    }
    for name, (found, expected) in stated.items():
        if found != expected:
            errors.add(f"{PARAMS}: {name}", f"{expected}, as the sizes beside it say", found)


def to_params_json(model_config: ModelConfig, vocab_size: int, plain: bool) -> dict:
    """A params.json from which Meta's code builds the network. plain: without what the code of Llama 1 and 2 refuses.

    Raises CheckpointError with everything that the format cannot express.
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
    """Raises CheckpointError with everything about a network that Meta's Llama code would compute otherwise."""
    errors = ErrorCollector("Meta's Llama format cannot express this network", CheckpointError)
    check_parameters(model_config, errors)
    if model_config.sliding_window is not None:
        errors.add("sliding_window", "none", model_config.sliding_window)
    if model_config.rope_scaling is not None and dict(model_config.rope_scaling) != LLAMA31_SCALING:
        errors.add(
            "rope_scaling", f"none, or {LLAMA31_SCALING}, the one that Meta's code has", dict(model_config.rope_scaling)
        )
    errors.raise_if_any()


def check_parameters(model_config: ModelConfig, errors: ErrorCollector) -> None:
    """Adds a fault for parameters that the files have no place for."""
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
    """The ffn size that Meta's code computes."""
    size = int(2 * (4 * hidden_size) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def find_ffn_rule(hidden_size: int, ffn_size: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier (None: none) that give an ffn size: the shortest multiplier that does."""
    coarse = [number for number in _powers_of_two() if ffn_size % number == 0]
    for multiplier in (None, *_candidate_multipliers(hidden_size, ffn_size)):
        for multiple_of in coarse:
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
        # The middle of what is rounded down to the size.
        yield round((ffn_size + 0.5) / plain, digits)
    yield (ffn_size + 0.5) / plain
