"""What the ranks run: the logits of a Megatron-core model beside those of transformers."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.full import parameters
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from tests.layer_norm_models import memory_of, model_of
from tests.models.full import pretrain_cases
from tests.tiny_models import llama_config, tokens


def logits_gap(scaling: dict, tp: int = 1, sequence_parallel: bool = False, family: str = "llama") -> float:
    """Returns the largest difference to transformers' logits, relative to their size."""
    if family == "llama":
        model_config = llama_config(num_heads=8, num_kv_heads=4, max_positions=12, rope_scaling=scaling)
    else:
        sizes = pretrain_cases.sizes(False, family)
        model_config = replace(sizes, hidden_size=64, head_dim=8, max_positions=12, rope_scaling=scaling)
    mesh = meshes.build_mesh(tp, 1)
    hf = model_of(model_config)
    model = build_model(model_config, BuildOptions(tp=tp, sequence_parallel=sequence_parallel), mesh)
    parameters.fill_parameters(model, model_config, mesh, memory_of(hf, model_config).read)
    ids = tokens(model_config)
    with torch.no_grad():
        expected = hf(ids).logits
        part = model.logits(ids).transpose(0, 1).contiguous()
    parts = [torch.empty_like(part) for _ in range(tp)]
    dist.all_gather(parts, part, group=mesh.tp_group)
    logits = torch.cat(parts, dim=-1)[..., : model_config.vocab_size]
    return float((logits - expected).abs().max() / expected.abs().max())


def logits_gaps(scaling: dict) -> dict[str, float]:
    """Returns the gaps of a Llama at TP 1 and 2, with sequence parallelism, and of a GPT-NeoX that rotates half.

    Sequences are longer than the models' contexts, so that `dynamic` scales.
    """
    gaps = {
        "tp 1": logits_gap(scaling),
        "tp 2": logits_gap(scaling, tp=2),
        "sequence parallel": logits_gap(scaling, tp=2, sequence_parallel=True),
    }
    gaps["gpt_neox"] = logits_gap(scaling, family="gpt_neox")
    return gaps
