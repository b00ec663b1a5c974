"""Rank functions: GPTModels of Megatron-core built from a checkpoint's own args, as Megatron-LM builds them."""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.mcore.attention import FusedAttention
from megatron_ligo.models.mcore.layer_spec import UNFUSED
from tests.checkpoint.formats.megatron_ranks import sharding_metadata


def build_model(args: argparse.Namespace) -> GPTModel:
    """Builds the model of Megatron-LM's arguments, with an attention that runs on the CPU."""
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        rotary_interleaved=args.rotary_interleaved,
        window_size=args.window_size,
        **UNFUSED,
        use_cpu_initialization=True,
    )
    config.attention_softcap = config.query_scaling = config.attention_chunk = config.chunk_layers = None
    config.l2_normalises_heads = False
    set_yarn_fields(config, args)
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization=args.normalization))
    spec.submodules.self_attention.submodules.core_attention = FusedAttention
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
    ).eval()


def set_yarn_fields(config: TransformerConfig, args: argparse.Namespace) -> None:
    """Sets the fields that GPTModel reads YaRN from, with Megatron-LM's defaults."""
    if args.position_embedding_type != "yarn":
        return
    defaults = {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    for name, default in defaults.items():
        setattr(config, f"yarn_{name}", getattr(args, name, default))
    for name, default in {
        "yarn_original_max_position_embeddings": 4096,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_correction_range_round_to_int": True,
    }.items():
        setattr(config, name, getattr(args, name, default))


@torch.no_grad()
def compute_logits(folders: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
    """Loads each torch_dist folder into the model of its own args. Returns logits (batch, sequence, vocab)."""
    meshes.build_mesh(1, 1)
    all_logits = []
    for folder in folders:
        args = torch.load(f"{folder}/common.pt", weights_only=False)["args"]
        model = build_model(args)
        state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=sharding_metadata())}, folder)
        model.load_state_dict(state["model"], strict=True)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        all_logits.append(model(ids, positions, None)[..., : args.vocab_size])
    return all_logits


def compute_angles(argument_sets: list[dict], length: int) -> list[tuple[torch.Tensor, float]]:
    """Returns the angles (length, features) of the model of each set of rope args, and its factor on cos and sin."""
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config,
    )

    meshes.build_mesh(1, 1)
    base = {
        "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 2,
        "kv_channels": 16, "normalization": "RMSNorm", "norm_epsilon": 1e-5, "swiglu": True, "add_bias_linear": False,
        "add_qkv_bias": False, "rotary_interleaved": False, "window_size": None, "padded_vocab_size": 8,
        "max_position_embeddings": 64, "untie_embeddings_and_output_weights": True, "rotary_percent": 1.0,
        "position_embedding_type": "rope", "use_rope_scaling": False, "rope_scaling_factor": 8.0,
    }  # fmt: skip
    results = []
    for arguments in argument_sets:
        model = build_model(argparse.Namespace(**base | arguments))
        angles = model.rotary_pos_emb(length)
        angles = angles[0] if isinstance(angles, tuple) else angles
        results.append((angles[:, 0, 0], _yarn_get_concentration_factor_from_config(model.config)))
    return results
