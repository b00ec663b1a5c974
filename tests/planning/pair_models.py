"""The pairs of launch_scripts/pairs at a sixteenth of their width: the same heads, layers in the same ratio.

Image and patch sides shrink alike, so that an image keeps its number of tokens.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from math import gcd
from pathlib import Path

from megatron_ligo import arch
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.growth.validation import derive_large_config
from megatron_ligo.training.initial_weights import read_model_config
from tests.models.factored import fit_cases

ROOT = Path(__file__).resolve().parents[2]
PAIRS = sorted((ROOT / "launch_scripts/pairs").glob("*.toml"))
SCALE, STEPS, LR = 16, 1, 0.02


def reduce_pair(path: Path) -> dict:
    """Returns the small and large sizes and the operator's settings of a pair, as `fit_cases.fit` takes them."""
    config = RunConfig.load(path)
    small = read_model_config(ROOT / config.small.path)
    large = derive_large_config(small, config.large)
    common = gcd(small.num_layers, large.num_layers)
    layer_scale = common if common < small.num_layers else common // 2

    def reduce_sizes(model_config: ModelConfig) -> dict:
        sizes = {name: getattr(model_config, name) // SCALE for name in ("hidden_size", "ffn_size", "head_dim")}
        sizes |= {"num_heads": model_config.num_heads, "num_kv_heads": model_config.num_kv_heads}
        sizes |= {"num_layers": model_config.num_layers // layer_scale, "vocab_size": 61}
        if model_config.image_size is None:
            return sizes | {"max_positions": 20}
        return sizes | {"image_size": model_config.image_size // SCALE}

    settings = {name: value for name, value in asdict(config.operator).items() if name in ("method", "rank")}
    if isinstance(settings["rank"], dict):
        settings["rank"] = {name: rank // SCALE for name, rank in settings["rank"].items()}
    small_sizes = _small_changes(small, reduce_sizes(small))
    return {"small": small_sizes, "large": reduce_sizes(large), "settings": settings}


def _small_changes(small: ModelConfig, sizes: dict) -> dict:
    """Returns the small model's sizes, as `fit_cases.small_dims` takes them."""
    if small.image_size is not None:
        unchanged = {name: getattr(small, name) for name in ("arch", "num_channels", "norm_eps", "activation")}
        return unchanged | sizes | {"patch_size": small.patch_size // SCALE}
    architecture = arch.get(small.arch)
    hf_class = {"class": architecture.hf_class(small)} if architecture.has_learned_positions else {}
    return asdict(replace(small, **sizes)) | hf_class


def choose_layout(pair: dict) -> dict:
    """Returns tp 2 if it divides the heads, otherwise pp 2."""
    return {"tp": 2} if pair["large"]["num_kv_heads"] % 2 == 0 else {"pp": 2}


def fit_pairs() -> list | None:
    """Fits each pair for a step on two ranks.

    Returns (losses, norms, operator, grown weights, loss afterwards) of each pair on rank 0.
    """
    pairs = [reduce_pair(path) for path in PAIRS]
    training = {"optimizer": "sgd", "lr": LR, "steps": STEPS, "micro_size": 4}
    return [fit_cases.fit(**pair, **choose_layout(pair), **training) for pair in pairs]
