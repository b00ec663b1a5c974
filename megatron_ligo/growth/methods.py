"""The named methods: each is a choice of all the keys of [operator], whatever the user says himself put over it.

LOSSLESS methods start with the small model's own logits: under RMSNorm at any ratio of the sizes that they take, under
LayerNorm at whole multiples of hidden_size (`can_be_lossless`). The user's own keys may take that away.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, Problem, did_you_mean
from megatron_ligo.config.run_config import OperatorSection

# Whole heads move, readers have maps of their own (left inverses), nothing is noisy or fresh.
DEFAULT_KEYS = {
    "width_init": "lossless",
    "depth_init": "lossless",
    "noise": 0.0,
    "structure": "heads",
    "share": "all",
    "contract": "free",
    "identity": "learned",
    "gain": "copied",
    "fresh": "none",
    "borrow": "none",
}

# Keys that leave the logits of a start as they are.
KEYS_THAT_KEEP_LOGITS = ("noise", "share", "identity")


@dataclass(frozen=True)
class Method:
    """what: one line; source: where it was published; keys: what differs from PLAIN."""

    summary: str
    is_lossless: bool
    source: str
    keys: dict


METHODS = {
    "lossless": Method(
        "copies in order, shared out among their readers; layers beside copies that write nothing",
        True,
        "this project; Net2Net's rule (arXiv 1511.05641), kept exact at ragged sizes",
        {},
    ),
    "noisy_stack": Method(
        "layers stacked, features copied, noise of 0.5 that the copied features cannot see but training can",
        False,
        "this project's best start without a fit; stacking: arXiv 2405.15319",
        {"depth_init": "stack", "noise": 0.5},
    ),
    "stack": Method(
        "layers stacked, features copied exactly", False, "StackBERT (ICML 2019), G_stack", {"depth_init": "stack"}
    ),
    "interlace": Method(
        "each layer beside its copies, features copied exactly", False, "arXiv 1710.10348", {"depth_init": "interlace"}
    ),
    "copy": Method(
        "features copied unscaled, layers in order and the last one again",
        False,
        "plain duplication",
        {"width_init": "copy", "depth_init": "copy"},
    ),
    "direct_copy": Method(
        "the small model in the large one's corner, fresh numbers around it; layers stacked",
        False,
        "the baseline of bert2BERT (arXiv 2110.07143)",
        {"width_init": "pad", "depth_init": "stack", "fresh": "all"},
    ),
    "random": Method(
        "as direct_copy, and the layers that are more are fresh as well",
        False,
        "G_random of arXiv 2405.15319",
        {"width_init": "pad", "depth_init": "pad", "fresh": "all"},
    ),
    "net2net": Method(
        "new features copy features drawn at random; new layers write nothing",
        True,
        "arXiv 1511.05641, kept exact at ragged sizes",
        {"width_init": "net2net"},
    ),
    "fpi": Method(
        "new features copy features drawn at random, unscaled; layers stacked",
        False,
        "bert2BERT's function-preserving initialisation (arXiv 2110.07143)",
        {"width_init": "select", "depth_init": "stack"},
    ),
    "aki": Method(
        "as fpi, with the new features' rows taken from the next layer",
        False,
        "bert2BERT's advanced knowledge initialisation (arXiv 2110.07143)",
        {"width_init": "select", "depth_init": "stack", "borrow": "next"},
    ),
    "hypercloning": Method(
        "whole copies of everything, each reader's weights divided among them",
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
        "copied residual features; fresh heads, neurons and layers that nobody reads yet",
        True,
        "after LEMON (arXiv 2310.07999)",
        {
            # A norm would see what is padded, that of a masked-LM head's transform too; nobody fills a pooler's.
            "width_init": {"default": "pad", "residual": "lossless", "head": "lossless", "pooled": "lossless"},
            "depth_init": "pad",
            "fresh": "writers",
        },
    ),
    "ligo": Method(
        "the published operator: dense maps, a set for each layer, read by their transposes",
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
    """The settings with every key that was left out as the method has it. Raises ConfigError for an unknown one."""
    if settings.method not in METHODS:
        hint = did_you_mean(settings.method, METHODS)
        raise ConfigError(Problem("operator.method", "a named method", repr(settings.method), hint))
    meant = _method_settings(settings.method, large)
    return replace(settings, **{key: value for key, value in meant.items() if getattr(settings, key) is None})


def _method_settings(name: str, large: ModelConfig) -> dict:
    """All keys of a method, its tables without the spaces that the large model does not have."""
    known = {"default", *architectures.get(large.arch).spaces(large)}
    return {
        key: {space: start for space, start in value.items() if space in known} if isinstance(value, dict) else value
        for key, value in {**DEFAULT_KEYS, **METHODS[name].keys}.items()
    }


def can_be_lossless(small: ModelConfig, large: ModelConfig) -> bool:
    """Whether any start keeps the logits at these sizes: a LayerNorm's mean and variance survive whole copies only."""
    return architectures.get(large.arch).norm == "rms" or large.hidden_size % small.hidden_size == 0


def describe_method(settings: OperatorSection, small: ModelConfig, large: ModelConfig) -> str:
    """What a method is and what it means, in a few lines; the user's own keys are named as such."""
    method = METHODS[settings.method]
    meant = _method_settings(settings.method, large)
    lines = [f"method {settings.method}: {method.summary} ({method.source})"]
    changed = []
    for field in fields(OperatorSection):
        if field.name in meant:
            value = getattr(settings, field.name)
            own = value != meant[field.name]
            lines.append(f"  {field.name} = {value!r}{'   (your own)' if own else ''}")
            changed += [field.name] if own and field.name not in KEYS_THAT_KEEP_LOGITS else []
    if method.is_lossless:
        lines[0] += f"; {_promise(can_be_lossless(small, large), changed)}"
    return "\n".join(lines)


def _promise(can_be: bool, changed: list[str]) -> str:
    """What a lossless method says of its start. changed: the user's own keys that may move the logits."""
    if not can_be:
        return "not lossless at these sizes"
    if changed:
        return f"not promised to be lossless with your own {', '.join(changed)}"
    return "starts with the small model's logits"
