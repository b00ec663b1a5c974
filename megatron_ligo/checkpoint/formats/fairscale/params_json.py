"""Reads params.json of Meta's Llama releases, and writes one from which Meta's code builds the same model.

    dim, n_layers, n_heads, n_kv_heads, vocab_size (-1: the tokenizer's), multiple_of, ffn_dim_multiplier, norm_eps,
    rope_theta, use_scaled_rope

It states neither the ffn size, which Meta's code computes from the others, nor the context length.
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
# Keys without effect on the model.
IGNORED = ("max_batch_size",)
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
# The largest multiple_of in any release.
COARSEST = 4096


def load_params(path: Path) -> dict:
    """Reads a params.json and checks every key. Raises CheckpointError with all problems."""
    params = config_json.load_config(path)
    errors = ErrorCollector(f"{path} describes a model that this program does not support", CheckpointError)
    known = (*SIZES, "norm_eps", *OPTIONAL, *IGNORED)
    for name in params:
        if name not in known:
            errors.add_message(
                f"unknown key {name!r}: the model may compute something else. {did_you_mean(name, known)}"
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
    """Adds an error for each size in which a params.json and dims.json or config.json beside it differ."""
    stated = {
        "dim": (params["dim"], model_config.hidden_size),
        "n_layers": (params["n_layers"], model_config.num_layers),
        "n_heads": (params["n_heads"], model_config.num_heads),
        "n_kv_heads": (params.get("n_kv_heads") or params["n_heads"], model_config.num_kv_heads),
        "norm_eps": (params["norm_eps"], model_config.norm_eps),
        "rope_theta": (params.get("rope_theta") or ROPE_BASE, model_config.rope_base),
        "use_scaled_rope": (params.get("use_scaled_rope", False), _is_scaled_as_llama3(model_config)),
    }
    for name, (value, expected) in stated.items():
        if value != expected:
            errors.add(f"{PARAMS}: {name}", f"{expected}, as the sizes beside it say", value)


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
