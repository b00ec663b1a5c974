"""Rank functions: GPTModels of Megatron-core, saved and loaded by Megatron-core's own code."""

from __future__ import annotations

import argparse
import copy
import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.reader import WEIGHT
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.mcore.attention import FusedAttention
from megatron_ligo.models.mcore.layer_spec import BuildOptions, build_transformer_config, get_normalization
from megatron_ligo.sharding import fused_tensors, pipeline_layers, tensor_parallel
from tests.checkpoint.hf_models import same_bits
from tests.tiny_models import tokens

PADDED_VOCAB_SIZE = 48


def build_gpt(model_config, mesh, dtype=torch.float32, padded_vocab_size=PADDED_VOCAB_SIZE):
    """Builds this rank's part of a GPTModel of local layers, with an attention that runs on the CPU."""
    # Megatron-core synchronises tied embeddings of two stages on the GPU.
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    config = build_transformer_config(model_config, BuildOptions(tp=mesh.tp, dtype=dtype))
    config.pipeline_model_parallel_size = mesh.pp
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization=get_normalization(model_config)))
    spec.submodules.self_attention.submodules.core_attention = FusedAttention
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size,
        max_sequence_length=model_config.max_positions,
        parallel_output=False,
        share_embeddings_and_output_weights=model_config.tied,
        position_embedding_type="rope" if model_config.rope_base else "learned_absolute",
        rotary_base=int(model_config.rope_base or 10_000),
        pre_process=mesh.first_stage,
        post_process=mesh.last_stage,
    )
    # As in Megatron-LM: not all norms follow the config's dtype.
    return model.to(dtype).eval()


def expected_tensors(model, source, mesh, kind=WEIGHT):
    """Yields (name, parameter, expected tensor) of this rank. kind: compares the weight, or a moment of it."""
    model_config = source.model_config
    first = pipeline_layers.stage_bounds(model_config.num_layers, mesh.pp)[mesh.pp_rank]
    stored = fused_tensors.stored_tensors(source.arch, model_config, "mcore")
    for name, parameter in model.named_parameters():
        if "layers." in name:
            local = int(name.split("layers.")[1].split(".")[0])
            item = stored[name.replace(f"layers.{local}.", f"layers.{local + first}.")]
        else:
            tied = model_config.tied and name == "output_layer.weight"
            item = stored["embedding.word_embeddings.weight" if tied else name]
        parts = [source.read(key, kind) for key in item.keys]
        if item.is_vocab_parallel:
            rows = parameter.shape[0] * mesh.tp
            parts = [tensor_parallel.pad_vocab(part, rows) for part in parts]
        yield name, parameter, item.assemble_shard(parts, model_config, mesh.tp, mesh.tp_rank)


def fill_weights(model, source, mesh):
    with torch.no_grad():
        for _, parameter, expected in expected_tensors(model, source, mesh):
            parameter.copy_(expected)


def assert_weights_equal(model, source, mesh):
    for name, parameter, expected in expected_tensors(model, source, mesh):
        assert same_bits(parameter.detach(), expected.to(parameter.dtype)), name


@torch.no_grad()
def compute_logits(model, model_config, mesh):
    """Runs the stages in turn. Returns logits (batch, sequence, vocab) on every rank."""
    ids = tokens(model_config)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = torch.empty(ids.shape[1], ids.shape[0], model_config.hidden_size)
    if not mesh.first_stage:
        dist.recv(hidden, mesh.dims.global_rank(mesh.tp_rank, mesh.pp_rank - 1, mesh.dp_rank))
        model.set_input_tensor(hidden)
    out = model(ids, positions, None).contiguous()
    if not mesh.last_stage:
        dist.send(out, mesh.dims.global_rank(mesh.tp_rank, mesh.pp_rank + 1, mesh.dp_rank))
        out = torch.empty(*ids.shape, model.vocab_size)
    dist.broadcast(out, mesh.dims.global_rank(0, mesh.pp - 1, 0))
    return out[..., : model_config.vocab_size]


def load_distributed(jobs: list[tuple[str, str, int, int]]) -> list[torch.Tensor]:
    """Loads each (folder, source, tp, pp) with Megatron-core, compares all parameters and returns the fp32 logits."""
    all_logits = []
    for folder, path, tp, pp in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        dtype = weight_dtype(source)
        model = build_gpt(source.model_config, mesh, dtype)
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
        state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=sharding_metadata())}, folder)
        assert state["args"].num_layers == source.model_config.num_layers
        model.load_state_dict(state["model"], strict=True)
        assert_weights_equal(model, source, mesh)
        all_logits.append(compute_logits(model, source.model_config, mesh) if dtype is torch.float32 else None)
    return all_logits


def load_by_rank(jobs: list[tuple[str, str, int, int]]) -> list[torch.Tensor]:
    """Loads the rank files of each (folder, source, tp, pp) as Megatron-LM does; returns the fp32 logits."""
    all_logits = []
    for folder, path, tp, pp in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        state = torch.load(rank_file(folder, mesh), weights_only=False)
        args, dtype = state["args"], weight_dtype(source)
        assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (tp, pp)
        model = build_gpt(source.model_config, mesh, dtype, args.padded_vocab_size)
        model.load_state_dict(state["model"], strict=True)
        assert_weights_equal(model, source, mesh)
        all_logits.append(compute_logits(model, source.model_config, mesh) if dtype is torch.float32 else None)
    return all_logits


def weight_dtype(source) -> torch.dtype:
    return source.info(next(iter(source.keys()))).dtype


def rank_file(folder: str, mesh) -> Path:
    name = f"mp_rank_{mesh.tp_rank:02d}" + (f"_{mesh.pp_rank:03d}" if mesh.pp > 1 else "")
    return Path(folder) / name / "model_optim_rng.pt"


def sharding_metadata(**more) -> dict:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True), **more}


def save_distributed(jobs: list[tuple[str, str, int, int, dict]]) -> None:
    """Saves a model with each source's weights by Megatron-core: (folder, source, tp, pp, sharding metadata)."""
    # Megatron-core writes in child processes, which a daemonic process may not have.
    multiprocessing.current_process()._config["daemon"] = False
    for folder, path, tp, pp, sharding_options in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        model = build_gpt(source.model_config, mesh, weight_dtype(source))
        fill_weights(model, source, mesh)
        Path(folder).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        state = {
            "model": model.sharded_state_dict(metadata=sharding_metadata(**sharding_options)),
            "iteration": 5,
            "checkpoint_version": 3.0,
            "args": build_run_args(source.model_config, tp, pp),
        }
        dist_checkpointing.save(state, folder, content_metadata=sharding_options)


def build_run_args(model_config, tp: int, pp: int) -> argparse.Namespace:
    """Returns arguments of a Megatron-LM run, among them enums and paths."""
    return argparse.Namespace(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        ffn_hidden_size=model_config.ffn_size,
        num_attention_heads=model_config.num_heads,
        group_query_attention=True,
        num_query_groups=model_config.num_kv_heads,
        kv_channels=model_config.head_dim,
        vocab_size=model_config.vocab_size,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        max_position_embeddings=model_config.max_positions,
        norm_epsilon=model_config.norm_eps,
        untie_embeddings_and_output_weights=not model_config.tied,
        add_qkv_bias=model_config.qkv_bias,
        add_bias_linear=False,
        swiglu=True,
        normalization="RMSNorm",
        position_embedding_type="rope",
        rotary_base=int(model_config.rope_base),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        data_path=[Path("some/where")],
    )
