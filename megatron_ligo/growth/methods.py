"""Named methods. Each sets all keys of [operator]; keys that the user sets take precedence.

Lossless methods start with the small model's logits: with RMSNorm at any ratio of sizes, with LayerNorm at whole
multiples of hidden_size (`can_be_lossless`). Keys that the user sets may break this.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields, replace

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, Problem, did_you_mean
from megatron_ligo.config.run_config import EMBEDDING, OperatorSection

# Maps act on whole heads, contracts are separate left inverses, and there is no noise and no random weight.
DEFAULT_KEYS = {
    "width_init": "lossless",
    "depth_init": "lossless",
    "noise": 0.0,
    "noise_draw": "map",
    "structure": "heads",
    "share": "all",
    "contract": "free",
    "identity": "learned",
    "gain": "copied",
    "fresh": "none",
    "fresh_scale": 1.0,
    "borrow": "none",
    "expert_start": "copies",
    "expert_drop": 0.0,
}
# Keys that say nothing of a model without experts.
EXPERT_KEYS = ("expert_start", "expert_drop")

# A pooler, which no loss trains, would keep padded features at zero.
PADDED = {"default": "pad", "pooled": "lossless"}

# Keys that do not change the logits of a start.
KEYS_THAT_KEEP_LOGITS = ("noise", "noise_draw", "share", "identity", "expert_start")


@dataclass(frozen=True)
class Method:
    """A named method. source: its publication; keys: its differences from DEFAULT_KEYS."""

    summary: str
    is_lossless: bool
    source: str
    keys: dict


METHODS = {
    "lossless": Method(
        "features copied in order and divided among their readers; copies of layers write nothing",
        True,
        "this project; Net2Net's rule (arXiv 1511.05641), kept exact at ragged sizes",
        {},
    ),
    "noisy_stack": Method(
        "layers stacked, features copied, noise that copies cancel but training sees",
        False,
        "this project's best start without a fit; stacking: arXiv 2405.15319",
        {"depth_init": "stack", "noise": 0.5},
    ),
    "stack": Method(
        "layers stacked, features copied exactly", False, "StackBERT (ICML 2019), G_stack", {"depth_init": "stack"}
    ),
    "interlace": Method(
        "each layer followed by its copies, features copied exactly",
        False,
        "arXiv 1710.10348",
        {"depth_init": "interlace"},
    ),
    "copy": Method(
        "features copied unscaled, layers in order, then copies of the last one",
        False,
        "plain duplication",
        {"width_init": "copy", "depth_init": "copy"},
    ),
    "direct_copy": Method(
        "the small model as one block of the large one, random numbers around it; layers stacked",
        False,
        "the baseline of bert2BERT (arXiv 2110.07143)",
        {"width_init": "pad", "depth_init": "stack", "fresh": "all"},
    ),
    "random": Method(
        "as direct_copy, with random new layers as well",
        False,
        "G_random of arXiv 2405.15319",
        {"width_init": "pad", "depth_init": "pad", "fresh": "all"},
    ),
    "net2net": Method(
        "new features copy random features; new layers write nothing",
        True,
        "arXiv 1511.05641, kept exact at ragged sizes",
        {"width_init": "net2net"},
    ),
    "fpi": Method(
        "new features copy random features, unscaled; layers stacked",
        False,
        "bert2BERT's function-preserving initialisation (arXiv 2110.07143)",
        {"width_init": "select", "depth_init": "stack"},
    ),
    "aki": Method(
        "as fpi, with the rows of new features taken from the next layer",
        False,
        "bert2BERT's advanced knowledge initialisation (arXiv 2110.07143)",
        {"width_init": "select", "depth_init": "stack", "borrow": "next"},
    ),
    "hypercloning": Method(
        "whole copies of all features, and readers' weights divided among them",
        True,
        "HyperCloning, symmetric (arXiv 2409.12903)",
        {"width_init": "clone"},
    ),
    "hypercloning_noisy": Method(
        "as hypercloning, with noise 10 dB below the weights that cancels between the copies",
        True,
        "HyperCloning, noisy (arXiv 2409.12903)",
        {"width_init": "clone", "noise": 0.316},
    ),
    "lemon": Method(
        "residual features copied; random heads, neurons and layers that nothing reads yet",
        True,
        "after LEMON (arXiv 2310.07999)",
        {
            # Norms (a masked-LM head's too, or one over all heads) would read padded features, and a pooler's would
            # stay zero.
            "width_init": {
                "default": "pad",
                "residual": "lossless",
                "head": "lossless",
                "pooled": "lossless",
                "groups": "lossless",
            },
            "depth_init": "pad",
            "fresh": "writers",
        },
    ),
    "corner": Method(
        "the small model in a corner of every space, the residual stream too; random writers, zero readers beside it",
        False,
        "this project; padding and perturbing: arXiv 2411.07340, 2605.13405",
        {"width_init": PADDED, "depth_init": "stack", "fresh": "corner"},
    ),
    "corner_quiet": Method(
        "as corner, new residual features a hundred times smaller, new layers that write nothing: nearly lossless",
        False,
        "this project",
        {
            "width_init": PADDED,
            "fresh": "corner",
            "fresh_scale": {"default": 1.0, "residual": 0.01, EMBEDDING: 0.01},
        },
    ),
    "ligo": Method(
        "the published operator: dense maps for each layer, and their transposes as contracts",
        False,
        "LiGO (arXiv 2303.00980), its code's defaults",
        {
            "width_init": "random",
            "depth_init": "stack_noisy",
            "structure": "dense",
            "share": {"default": "layer", "residual": "all"},
            "contract": "tied",
            "identity": "frozen",
            "gain": "expand",
        },
    ),
}


def resolve_settings(settings: OperatorSection, large: ModelConfig) -> OperatorSection:
    """Returns the settings with the method's values for unset keys. ConfigError for an unknown method."""
    if settings.method not in METHODS:
        hint = did_you_mean(settings.method, METHODS)
        raise ConfigError(Problem("operator.method", "a named method", repr(settings.method), hint))
    defaults = _method_settings(settings.method, large)
    return replace(settings, **{key: value for key, value in defaults.items() if getattr(settings, key) is None})


def _method_settings(name: str, large: ModelConfig) -> dict:
    """Returns all keys of a method. Tables by space omit the spaces that the large model lacks."""
    arch = architectures.get(large.arch)
    known = {"default", EMBEDDING, *arch.spaces(large)} | ({"groups"} if arch.normalises_all_heads else set())
    return {
        key: {space: start for space, start in value.items() if space in known} if isinstance(value, dict) else value
        for key, value in {**DEFAULT_KEYS, **METHODS[name].keys}.items()
        if large.num_experts or key not in EXPERT_KEYS
    }


def can_be_lossless(small: ModelConfig, large: ModelConfig) -> bool:
    """True if some start preserves the logits at these sizes. A LayerNorm's statistics require whole copies."""
    return architectures.get(large.arch).uses_rms_norm or large.hidden_size % small.hidden_size == 0


def describe_method(settings: OperatorSection, small: ModelConfig, large: ModelConfig) -> str:
    """Describes a method and its keys, and marks the keys that the user has changed."""
    method = METHODS[settings.method]
    defaults = _method_settings(settings.method, large)
    text = f"method {settings.method}: {method.summary} ({method.source})"
    keys, changed = [], []
    for field in fields(OperatorSection):
        if field.name in defaults:
            value = getattr(settings, field.name)
            is_own = value != defaults[field.name]
            keys.append(f"{field.name}={value!r}{' (your own)' if is_own else ''}")
            changed += [field.name] if is_own and field.name not in KEYS_THAT_KEEP_LOGITS else []
    if method.is_lossless:
        text += f"; {_promise(can_be_lossless(small, large), changed)}"
    return "\n".join([text, *textwrap.wrap(", ".join(keys), 100, initial_indent="  ", subsequent_indent="  ")])


def _promise(can_be: bool, changed: list[str]) -> str:
    """Describes the start of a lossless method. changed: keys set by the user that may change the logits."""
    if not can_be:
        return "not lossless at these sizes"
    if changed:
        return f"not guaranteed to be lossless with your own {', '.join(changed)}"
    return "starts with the small model's logits"
