"""What the ranks run: real GPTModels of Megatron-core, saved and loaded by Megatron-core's own means."""

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

PADDED = 48


def gpt(model_config, mesh, dtype=torch.float32, padded=PADDED):
    """This rank's part of a model of Megatron-core's own local layers; only the attention is one that runs here."""
    # Megatron-core lets tied embeddings of several stages agree on a GPU.
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    config = build_transformer_config(model_config, BuildOptions(tp=mesh.tp, dtype=dtype))
    config.pipeline_model_parallel_size = mesh.pp
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization=get_normalization(model_config)))
    spec.submodules.self_attention.submodules.core_attention = FusedAttention
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded,
        max_sequence_length=model_config.max_positions,
        parallel_output=False,
        share_embeddings_and_output_weights=model_config.tied,
        position_embedding_type="rope" if model_config.rope_base else "learned_absolute",
        rotary_base=int(model_config.rope_base or 10_000),
        pre_process=mesh.first_stage,
        post_process=mesh.last_stage,
    )
    # As Megatron-LM does: not all norms obey the config.
    return model.to(dtype).eval()


def held(model, source, mesh, kind=WEIGHT):
    """Each parameter of this rank with what it, or Adam's tensor for it, must be: (name, parameter, expected)."""
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


def fill(model, source, mesh):
    with torch.no_grad():
        for _, parameter, expected in held(model, source, mesh):
            parameter.copy_(expected)


def assert_holds(model, source, mesh):
    for name, parameter, expected in held(model, source, mesh):
        assert same_bits(parameter.detach(), expected.to(parameter.dtype)), name


@torch.no_grad()
def logits(model, model_config, mesh):
    """(b, s, vocab) on every rank, stage after stage."""
    ids = tokens(model_config)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = torch.empty(ids.shape[1], ids.shape[0], model_config.hidden_size)
    if not mesh.first_stage:
        dist.recv(hidden, mesh.rank_of(mesh.tp_rank, mesh.pp_rank - 1, mesh.dp_rank))
        model.set_input_tensor(hidden)
    out = model(ids, positions, None).contiguous()
    if not mesh.last_stage:
        dist.send(out, mesh.rank_of(mesh.tp_rank, mesh.pp_rank + 1, mesh.dp_rank))
        out = torch.empty(*ids.shape, model.vocab_size)
    dist.broadcast(out, mesh.rank_of(0, mesh.pp - 1))
    return out[..., : model_config.vocab_size]


def load_distributed(jobs: list[tuple[str, str, int, int]]) -> list[torch.Tensor]:
    """Megatron-core's own `load` of each (folder, source, tp, pp): every parameter is right; the logits."""
    found = []
    for folder, path, tp, pp in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        dtype = source.info("embed").dtype
        model = gpt(source.model_config, mesh, dtype)
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
        state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata())}, folder)
        assert state["args"].num_layers == source.model_config.num_layers
        model.load_state_dict(state["model"], strict=True)
        assert_holds(model, source, mesh)
        found.append(logits(model, source.model_config, mesh) if dtype is torch.float32 else None)
    return found


def load_by_rank(jobs: list[tuple[str, str, int, int]]) -> list[torch.Tensor]:
    """What Megatron-LM does with a rank's file, of each (folder, source, tp, pp)."""
    found = []
    for folder, path, tp, pp in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        state = torch.load(rank_file(folder, mesh), weights_only=False)
        args, dtype = state["args"], source.info("embed").dtype
        assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (tp, pp)
        model = gpt(source.model_config, mesh, dtype, args.padded_vocab_size)
        model.load_state_dict(state["model"], strict=True)
        assert_holds(model, source, mesh)
        found.append(logits(model, source.model_config, mesh) if dtype is torch.float32 else None)
    return found


def rank_file(folder: str, mesh) -> Path:
    name = f"mp_rank_{mesh.tp_rank:02d}" + (f"_{mesh.pp_rank:03d}" if mesh.pp > 1 else "")
    return Path(folder) / name / "model_optim_rng.pt"


def metadata(**more) -> dict:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True), **more}


def save_distributed(jobs: list[tuple[str, str, int, int, dict]]) -> None:
    """Megatron-core's own `save` of a model filled from each source: (folder, source, tp, pp, how)."""
    # It writes in processes of its own, which those that are ended with their parent may not have.
    multiprocessing.current_process()._config["daemon"] = False
    for folder, path, tp, pp, how in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        model = gpt(source.model_config, mesh, source.info("embed").dtype)
        fill(model, source, mesh)
        Path(folder).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        state = {
            "model": model.sharded_state_dict(metadata=metadata(**how)),
            "iteration": 5,
            "checkpoint_version": 3.0,
            "args": run_arguments(source.model_config, tp, pp),
        }
        dist_checkpointing.save(state, folder, content_metadata=how)


def run_arguments(model_config, tp: int, pp: int) -> argparse.Namespace:
    """The arguments of a run of Megatron-LM's, with what it keeps besides numbers and strings."""
    return argparse.Namespace(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        ffn_hidden_size=model_config.ffn_size,
        num_attention_heads=model_config.num_heads,
        group_query_attention=True,
        num_query_groups=model_config.num_kv_heads,
        kv_channels=model_config.head_dim,
        vocab_size=model_config.vocab_size,
        padded_vocab_size=PADDED,
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
