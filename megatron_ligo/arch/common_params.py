"""Parameters of linears and norms, and the locations of a module's tensors in the formats.

A module's locations omit the final `.weight` or `.bias` of its tensors' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from megatron_ligo.arch.common_axes import RESIDUAL_BIAS, RESIDUAL_GAIN
from megatron_ligo.arch.spec import Axis, FormatLocation, Pack, ParamSpec, Role

Locations = Mapping[str, FormatLocation]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu")
# Other names in Hugging Face of the same functions: in fp32 they differ by rounding only.
ACTIVATION_SYNONYMS = {
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "swish": "silu",
}

# Keys of every causal family's Hugging Face config, in `Architecture.hf_fixed`.
CAUSAL = {"is_causal": (True,)}
# The reason for keys in `Architecture.hf_harmless`.
DROPOUT = "dropout acts in training only, and this program trains without it"
OTHER_HEADS = "only classes with other heads read it"


def locations(hf: str, mcore: str, gguf: str = "") -> Locations:
    """Returns the locations of a tensor or module from its names in Hugging Face's and Megatron-core's models.

    gguf: its name in GGUF files, if they hold the family.
    """
    names = {"hf": FormatLocation(hf), "mcore": FormatLocation(mcore)}
    return names | {"gguf": FormatLocation(gguf)} if gguf else names


def locations_below(hf_prefix: str, mcore_prefix: str, gguf_prefix: str = "") -> Callable[..., Locations]:
    """Returns `locations` with a prefix prepended to each of the names."""
    return lambda hf, mcore, gguf="": locations(hf_prefix + hf, mcore_prefix + mcore, gguf and gguf_prefix + gguf)


def grouped_qkv(module: Locations, part: int, formats: tuple[str, ...] = ("mcore",)) -> Locations:
    """Returns the locations of q, k or v (part 0, 1 or 2) in a module that `formats` fuse by KV group."""
    return {
        name: replace(location, pack=Pack.GROUPED, part=part, num_parts=3) if name in formats else location
        for name, location in module.items()
    }


def weight_of(module: Locations) -> Locations:
    return {name: replace(location, name=f"{location.name}.weight") for name, location in module.items()}


def bias_of(module: Locations) -> Locations:
    return {
        name: replace(location, name=f"{location.name}.bias", transposed=False) for name, location in module.items()
    }


def linear_params(
    key: str, role: Role, axes: tuple[Axis, Axis], tp_dim: int | None, module: Locations, **fields
) -> Iterator[ParamSpec]:
    """Yields a linear's weight and bias. The bias is sharded if the outputs are. fields: other `ParamSpec` fields."""
    yield ParamSpec(key, role, axes, tp_dim, weight_of(module), **fields)
    bias_tp_dim = 0 if tp_dim == 0 else None
    yield ParamSpec(f"{key}_bias", role, axes[:1], bias_tp_dim, bias_of(module), is_bias=True, **fields)


def optional_bias(params: Iterable[ParamSpec], flag: str) -> Iterator[ParamSpec]:
    """Yields a module's weight and its bias, which exists if the field `flag` of `ModelConfig` says so."""
    for param in params:
        yield replace(param, requires=flag) if param.is_bias else param


def without_format(params: Iterable[ParamSpec], format_name: str) -> Iterator[ParamSpec]:
    """Yields parameters without their locations in a format that cannot state the network."""
    for param in params:
        yield replace(param, locations={name: loc for name, loc in param.locations.items() if name != format_name})


def norm_params(
    key: str, role: Role, module: Locations, axes: tuple[Axis, Axis] = (RESIDUAL_GAIN, RESIDUAL_BIAS), **fields
) -> Iterator[ParamSpec]:
    """Yields a LayerNorm's gain and bias. axes: those of the gain and of the bias."""
    gain_axis, bias_axis = axes
    yield ParamSpec(key, role, (gain_axis,), None, weight_of(module), **fields)
    yield ParamSpec(f"{key}_bias", role, (bias_axis,), None, bias_of(module), is_bias=True, **fields)
