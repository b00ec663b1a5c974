"""The rotary positions in Megatron-LM's run arguments, as Megatron-core's models obey them.

    linear      rotary_seq_len_interpolation_factor
    llama3      use_rope_scaling and rope_scaling_factor, with the constants of Llama 3.1 only
    yarn        position_embedding_type "yarn", rotary_scaling_factor, mscale, mscale_all_dim and yarn_*

Other scalings cannot be stated. Megatron-Bridge gives all of YaRN's fields the prefix yarn_.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo import arch as architectures
from megatron_ligo.arch.mcore_biases import has_common_biases, linear_biases
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_scaling import ORIGINAL_LENGTH, attention_factor, scaling_kind, yarn_scale
from megatron_ligo.arch.spec import EXPERT_ROLES, Role
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

# The constants of Llama 3.1, the only ones in Megatron-core. The factor is an argument.
LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL_LENGTH: 8192}
# Versions of Megatron-LM that ignore the argument compute with its default.
LLAMA3_FACTOR = 8.0
# Argument of YaRN -> its default in Megatron-LM. A prefixed name comes first.
YARN_DEFAULTS = {
    "rotary_scaling_factor": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "correction_range_round_to_int": True,
}
PREFIX = "yarn_"
# Arguments without the prefix in Megatron-LM.
UNPREFIXED = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
YARN_ARGS = (*UNPREFIXED, *(PREFIX + name for name in YARN_DEFAULTS))
INTERPOLATION = "rotary_seq_len_interpolation_factor"
SCALING_ARGS = ("position_embedding_type", "use_rope_scaling", "rope_scaling_factor", INTERPOLATION, *YARN_ARGS)


def check_rope_args(args: Mapping[str, object], errors: ErrorCollector) -> None:
    """Adds an error if the arguments describe positions that no scaling of a Llama states."""
    kind = args.get("position_embedding_type") or "rope"
    if kind not in ("rope", "yarn") and not args.get("use_rotary_position_embeddings"):
        errors.add("position_embedding_type", "rope or yarn", repr(kind))
    scalings = {
        INTERPOLATION: args.get(INTERPOLATION) not in (None, 1),
        "use_rope_scaling": bool(args.get("use_rope_scaling")),
        "position_embedding_type": kind == "yarn",
    }
    stated = [name for name, is_stated in scalings.items() if is_stated]
    if len(stated) > 1:
        errors.add(" and ".join(stated), "one scaling of the rotary positions", "several")
    # Megatron-LM states its default where nothing is scaled.
    unscaled = (None, 1, LLAMA3_FACTOR) if "use_rope_scaling" in args else (None, 1)
    if not args.get("use_rope_scaling") and args.get("rope_scaling_factor") not in unscaled:
        hint = "Some forks of Megatron-LM scale linearly by it: put the model's config.json beside the weights."
        errors.add("rope_scaling_factor", "none without use_rope_scaling", args["rope_scaling_factor"], hint)


def parse_rope_args(args: Mapping[str, object]) -> dict[str, object]:
    """Returns the `rope_base` and `rope_scaling` that the arguments describe."""
    return {"rope_base": float(args["rotary_base"]), "rope_scaling": _parse_scaling(args)}


def _parse_scaling(args: Mapping[str, object]) -> dict | None:
    if args.get("position_embedding_type") == "yarn":
        return _parse_yarn(args)
    if args.get("use_rope_scaling"):
        return {"rope_type": "llama3", "factor": args.get("rope_scaling_factor", LLAMA3_FACTOR), **LLAMA3_CONSTANTS}
    if args.get(INTERPOLATION) not in (None, 1):
        return {"rope_type": "linear", "factor": args[INTERPOLATION]}
    return None


def _parse_yarn(args: Mapping[str, object]) -> dict:
    values = dict(YARN_DEFAULTS)
    for name in YARN_DEFAULTS:
        for own in (PREFIX + name, *((name,) if name in UNPREFIXED else ())):
            if args.get(own) is not None:
                values[name] = args[own]
                break
    scaling = {
        "rope_type": "yarn",
        "factor": values["rotary_scaling_factor"],
        ORIGINAL_LENGTH: values["original_max_position_embeddings"],
    }
    stated = {
        "beta_fast": ("beta_fast", values["beta_fast"]),
        "beta_slow": ("beta_slow", values["beta_slow"]),
        "correction_range_round_to_int": ("truncate", values["correction_range_round_to_int"]),
    }
    scaling |= {key: value for name, (key, value) in stated.items() if value != YARN_DEFAULTS[name]}
    mscale, all_dims = values["mscale"], values["mscale_all_dim"]
    if mscale and all_dims:
        return {**scaling, "mscale": mscale, "mscale_all_dim": all_dims}
    factor = yarn_scale(scaling["factor"], mscale) / yarn_scale(scaling["factor"], all_dims)
    return scaling if factor == yarn_scale(scaling["factor"]) else {**scaling, "attention_factor": factor}


def to_rope_args(model_config: ModelConfig) -> dict[str, object]:
    """Returns the arguments with which Megatron-LM computes the rotary positions of a Llama."""
    scaling, kind = model_config.rope_scaling or {}, scaling_kind(model_config.rope_scaling)
    args = {
        "position_embedding_type": "yarn" if kind == "yarn" else "rope",
        "use_rotary_position_embeddings": False,
        "rotary_base": _to_int_if_whole(model_config.rope_base),
        "rotary_percent": model_config.rotary_fraction,
        "rotary_interleaved": False,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": scaling["factor"] if kind == "llama3" else LLAMA3_FACTOR,
    }
    if kind == "linear":
        args[INTERPOLATION] = _to_int_if_whole(scaling["factor"])
    return args | (_to_yarn_args(scaling) if kind == "yarn" else {})


def has_llama_layers(model_config: ModelConfig) -> bool:
    """True if a model's layers are Llama's but for norms of each head, experts, and which have a window or rotary
    positions."""
    arch, llama = architectures.get(model_config.arch), architectures.get("llama")
    own = (Role.QUERY_NORM, Role.KEY_NORM) if arch.normalises_each_head else ()
    own += EXPERT_ROLES
    names = {param.locations["mcore"].name for param in arch.params if param.role not in own}
    factors = model_config.embedding_multiplier, model_config.residual_multiplier, model_config.logits_divisor
    is_plain = factors == (1, 1, 1) and model_config.attention_scale is None and not arch.scales_embedding
    is_plain = is_plain and model_config.logits_multiplier == 1 and not model_config.parallel_residual
    is_plain = is_plain and arch.uses_rms_norm and not arch.gain_offset and model_config.activation == "silu"
    return is_plain and names <= {param.locations["mcore"].name for param in llama.params}


def check_sayable(model_config: ModelConfig) -> None:
    """Raises CheckpointError for a scaling of rotary positions that Megatron-LM's arguments cannot state."""
    if model_config.has_window_positions:
        expected = "none: Megatron-LM's args state the positions of all layers at once"
        hint = "The formats hf and universal can state it."
        raise CheckpointError(Problem("window_rope_base", expected, model_config.window_rope_base, hint))
    if model_config.query_scaling_beta:
        expected = "0: Megatron-LM's args cannot state that queries are scaled by position"
        hint = "The formats hf and universal can state it."
        raise CheckpointError(Problem("query_scaling_beta", expected, model_config.query_scaling_beta, hint))
    own = {"attention_chunk": "attention in chunks", "l2_normalises_heads": "norms of heads without gains"}
    for name, what in own.items():
        if getattr(model_config, name):
            hint = "The formats hf and universal can state it."
            expected = f"none: Megatron-LM's args cannot state {what}"
            raise CheckpointError(Problem(name, expected, getattr(model_config, name), hint))
    if architectures.get(model_config.arch).is_causal and not has_common_biases(model_config):
        biased = ", ".join(name for name, has_bias in linear_biases(model_config).items() if has_bias)
        hint = "The formats hf and universal can state it."
        expected = "on all linears, on q, k and v, or none: Megatron-LM's args state no others"
        raise CheckpointError(Problem("biases", expected, f"on {biased}", hint))
    if model_config.position_offset:
        expected = "0: Megatron-core's positions start at row 0 of their table"
        hint = "The formats hf and universal can state it."
        raise CheckpointError(Problem("position_offset", expected, model_config.position_offset, hint))
    reason = _explain_unsayable(model_config)
    if reason:
        where = f"rope_scaling ({scaling_kind(model_config.rope_scaling)})"
        hint = "The formats hf and universal can state it."
        raise CheckpointError(Problem(where, "one that Megatron-LM's args state", reason, hint))


def _explain_unsayable(model_config: ModelConfig) -> str:
    """Returns why Megatron-LM's arguments cannot state the scaling; "" if they can."""
    scaling, kind = model_config.rope_scaling or {}, scaling_kind(model_config.rope_scaling)
    if scaling and not has_llama_layers(model_config):
        return f"that of a {model_config.model_type}, whose args state no rotary positions"
    if kind in ("dynamic", "longrope"):
        return f"{kind}, which Megatron-core has not"
    if kind == "llama3":
        others = [f"{key} {scaling[key]}" for key, value in LLAMA3_CONSTANTS.items() if scaling[key] != value]
        return f"{', '.join(others)}: Megatron-core has Llama 3.1's constants only" if others else ""
    if kind == "yarn" and model_config.rotary_fraction != 1:
        return f"rotary_fraction {model_config.rotary_fraction}, which Megatron-core's YaRN ignores"
    if kind == "yarn" and scaling[ORIGINAL_LENGTH] != int(scaling[ORIGINAL_LENGTH]):
        return f"{ORIGINAL_LENGTH} {scaling[ORIGINAL_LENGTH]}, which is not a whole number"
    if kind == "yarn" and scaling["factor"] <= 1 and attention_factor(scaling) != 1:
        return f"attention_factor {scaling['attention_factor']} at a factor of {scaling['factor']}"
    return ""


def _to_yarn_args(scaling: Mapping) -> dict[str, object]:
    mscale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scaling.get("attention_factor") is not None and scaling["factor"] > 1:
        # The mscale at which Megatron-core's rule gives the factor.
        mscale = (attention_factor(scaling) - 1) / (yarn_scale(scaling["factor"]) - 1)
        all_dims = 0.0
    elif not (mscale and all_dims):
        mscale, all_dims = YARN_DEFAULTS["mscale"], YARN_DEFAULTS["mscale_all_dim"]
    return {
        "rotary_scaling_factor": float(scaling["factor"]),
        "mscale": float(mscale),
        "mscale_all_dim": float(all_dims),
        "yarn_original_max_position_embeddings": int(scaling[ORIGINAL_LENGTH]),
        "yarn_beta_fast": float(scaling.get("beta_fast") or YARN_DEFAULTS["beta_fast"]),
        "yarn_beta_slow": float(scaling.get("beta_slow") or YARN_DEFAULTS["beta_slow"]),
        "yarn_correction_range_round_to_int": scaling.get("truncate", True),
    }


def explain_reading(model_config: ModelConfig) -> str:
    """Returns how Megatron-LM must be started to compute the model's scaling; "" if it has none, or none to state."""
    scaling, kind = model_config.rope_scaling, scaling_kind(model_config.rope_scaling)
    if _explain_unsayable(model_config):
        return ""
    if kind == "linear":
        flags = f"--rotary-seq-len-interpolation-factor {scaling['factor']:g}"
    elif kind == "llama3":
        flags = f"--use-rope-scaling --rope-scaling-factor {scaling['factor']:g}"
    elif kind == "yarn":
        flags = " ".join(_to_flag(name, value) for name, value in _to_yarn_args(scaling).items())
    else:
        return ""
    text = f"Megatron-LM takes the scaling of rotary positions from its own flags, not from a checkpoint: pass {flags}"
    if kind == "llama3" and scaling["factor"] != LLAMA3_FACTOR:
        text += (
            f". Versions that do not hand rope_scaling_factor to GPTModel (its issue 6305) compute with "
            f"{LLAMA3_FACTOR:g} all the same: another model"
        )
    if kind == "linear":
        text += ". Versions that do not hand it to GPTModel (its pull request 2902) compute another model"
    return text


def _to_flag(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value!r}"


def _to_int_if_whole(number: float | None) -> float | int | None:
    """Returns an int for a whole number: Megatron-LM's rotary base is one."""
    return int(number) if number is not None and number == int(number) else number
