"""The pairs of launch_scripts/pairs at a sixteenth of their width: the same heads, layers in the same ratio.

An image's side and its patches' too: it has as many tokens as at its true size.
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
LESS, STEPS, LR = 16, 1, 0.02


def reduced(path: Path) -> dict:
    """small, large and settings of a pair, as `cases.fit` takes them."""
    config = RunConfig.load(path)
    small = read_model_config(ROOT / config.small.path)
    large = derive_large_config(small, config.large)
    common = gcd(small.num_layers, large.num_layers)
    times = common if common < small.num_layers else common // 2

    def less(model_config) -> dict:
        found = {name: getattr(model_config, name) // LESS for name in ("hidden_size", "ffn_size", "head_dim")}
        found |= {"num_heads": model_config.num_heads, "num_kv_heads": model_config.num_kv_heads}
        found |= {"num_layers": model_config.num_layers // times, "vocab_size": 61}
        if model_config.image_size is None:
            return found | {"max_positions": 20}
        return found | {"image_size": model_config.image_size // LESS}

    operator = {name: value for name, value in asdict(config.operator).items() if name in ("method", "rank")}
    if isinstance(operator["rank"], dict):
        operator["rank"] = {name: rank // LESS for name, rank in operator["rank"].items()}
    return {"small": _changes(small, less(small)), "large": less(large), "settings": operator}


def _changes(small: ModelConfig, less: dict) -> dict:
    """The small model's sizes, as `cases.small_dims` takes them."""
    if small.image_size is not None:
        kept = {name: getattr(small, name) for name in ("arch", "num_channels", "norm_eps", "activation")}
        return kept | less | {"patch_size": small.patch_size // LESS}
    named = {"class": arch.get(small.arch).hf_class(small)} if arch.get(small.arch).has_learned_positions else {}
    return asdict(replace(small, **less)) | named


def layout(pair: dict) -> dict:
    """tp 2 where it divides the heads, else two stages."""
    return {"tp": 2} if pair["large"]["num_kv_heads"] % 2 == 0 else {"pp": 2}


def fitted() -> list | None:
    """(losses, norms, operator, grown weights, loss afterwards) of a short fit of each pair, on rank 0 of two."""
    pairs = [reduced(path) for path in PAIRS]
    return [fit_cases.fit(**pair, **layout(pair), optimizer="sgd", lr=LR, steps=STEPS, micro_size=4) for pair in pairs]
