"""Rank functions: GPTModels of Megatron-core with experts, saved and loaded by Megatron-core's own code."""

from __future__ import annotations

import copy
import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import experts, upcycling_utils

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.experts import as_mixture
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.models.mcore.attention import FusedAttention
from megatron_ligo.models.mcore.layer_spec import BuildOptions, build_transformer_config
from megatron_ligo.sharding import fused_tensors
from tests.checkpoint.formats import megatron_optimizers
from tests.checkpoint.formats.megatron_ranks import PADDED_VOCAB_SIZE, build_run_args, sharding_metadata
from tests.checkpoint.hf_models import same_bits
from tests.tiny_models import tokens

# Megatron-core 0.19 computes experts by one product with Transformer Engine only.
HAS_GROUPED = hasattr(experts, "GroupedMLP")


def build_experts(model_config, tp: int, ep: int, grouped: bool = False, padded_vocab_size=PADDED_VOCAB_SIZE):
    """Builds this rank's part of a GPTModel whose experts are computed one by one, or by a grouped product."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, expert_model_parallel_size=ep, create_gloo_process_groups=False)
    config = build_transformer_config(model_config, BuildOptions(tp=tp))
    config.expert_model_parallel_size, config.expert_tensor_parallel_size = ep, tp
    kind = {}
    if HAS_GROUPED:
        # The product itself runs on GPUs only; the weights and their names do not need it.
        experts.gg.assert_grouped_gemm_is_available = lambda: None
        kind = {"moe_grouped_gemm": grouped, "moe_use_legacy_grouped_gemm": grouped}
        config.moe_grouped_gemm = config.moe_use_legacy_grouped_gemm = grouped
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(
            num_experts=model_config.num_experts or None,
            **kind,
            qk_layernorm=config.qk_layernorm,
            normalization="RMSNorm",
        )
    )
    spec.submodules.self_attention.submodules.core_attention = FusedAttention
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size,
        max_sequence_length=model_config.max_positions,
        parallel_output=False,
        share_embeddings_and_output_weights=model_config.tied,
        position_embedding_type="rope",
        rotary_base=int(model_config.rope_base),
    ).eval()


def expected_parameters(model, source, padded: bool = True, kind: str = WEIGHT):
    """Yields (name, parameter, expected tensor) of this rank. padded: the vocabulary is. kind: or a moment."""
    model_config, tp = source.model_config, parallel_state.get_tensor_model_parallel_world_size()
    count = max(model_config.num_experts, 1) // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * count
    stored = fused_tensors.stored_tensors(source.arch, model_config, "mcore")

    def read(item):
        parts = [source.read(key, kind) for key in item.keys]
        if item.is_vocab_parallel and padded:
            parts = [torch.cat([part, part.new_zeros(PADDED_VOCAB_SIZE - len(part), part.shape[1])]) for part in parts]
        return item.assemble_shard(parts, model_config, tp, parallel_state.get_tensor_model_parallel_rank())

    for name, parameter in model.named_parameters():
        head, found, tail = name.partition(".local_experts.")
        if found:
            local, _, rest = tail.partition(".")
            name = f"{head}{found}{int(local) + first}.{rest}"
        if name in stored:
            yield name, parameter, read(stored[name])
            continue
        # The weights of a grouped product: experts one after another, transposed.
        number = 1 if name.endswith("weight1") else 2
        names = [
            name.replace(f"weight{number}", f"local_experts.{first + local}.linear_fc{number}.weight")
            for local in range(count)
        ]
        parts = torch.stack([read(stored[expert]).T for expert in names])
        yield name, parameter, parts.reshape(parameter.shape)


def save_experts(jobs: list[tuple[str, str, int, int, bool, dict]]) -> None:
    """Saves each (folder, source, tp, ep, grouped, sharding metadata) by Megatron-core."""
    # Megatron-core writes in child processes, which a daemonic process may not have.
    multiprocessing.current_process()._config["daemon"] = False
    for folder, path, tp, ep, grouped, sharding in jobs:
        source = formats.open(path)
        model = build_experts(source.model_config, tp, ep, grouped)
        with torch.no_grad():
            for _, parameter, expected in expected_parameters(model, source):
                parameter.copy_(expected)
        Path(folder).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        state = {
            "model": model.sharded_state_dict(metadata=sharding_metadata(**sharding)),
            "iteration": 5,
            "checkpoint_version": 3.0,
            "args": build_expert_args(source.model_config, tp, ep, grouped),
        }
        dist_checkpointing.save(state, folder, content_metadata=sharding)


def build_expert_args(model_config, tp: int, ep: int, grouped: bool):
    """Returns arguments of a Megatron-LM run of a model with experts."""
    args = build_run_args(model_config, tp, 1)
    args.num_experts, args.moe_router_topk = model_config.num_experts, model_config.top_k
    args.ffn_hidden_size, args.moe_ffn_hidden_size = 4 * model_config.hidden_size, model_config.ffn_size
    args.moe_router_pre_softmax = not model_config.renormalises_routing
    args.moe_layer_freq, args.moe_grouped_gemm = 1, grouped
    args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "aux_loss", 0.01
    args.moe_router_score_function, args.moe_expert_capacity_factor = "softmax", None
    args.expert_model_parallel_size, args.expert_tensor_parallel_size = ep, tp
    args.qk_layernorm = "qwen3" in model_config.arch
    return args


def load_experts(jobs: list[tuple[str, str, int, int, bool]]) -> list[torch.Tensor | None]:
    """Loads each (folder, source, tp, ep, grouped) by Megatron-core, compares all weights, returns the logits."""
    return [_load(*job) for job in jobs]


@torch.no_grad()
def _load(folder: str, path: str, tp: int, ep: int, grouped: bool) -> torch.Tensor | None:
    source = formats.open(path)
    model = build_experts(source.model_config, tp, ep, grouped)
    for parameter in model.parameters():
        parameter.fill_(7.0)
    if (Path(folder) / "metadata.json").is_file():
        state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=sharding_metadata())}, folder)
    else:
        state = torch.load(_rank_file(folder, ep), weights_only=False)
        assert state["args"].expert_model_parallel_size == ep
    model.load_state_dict(state["model"], strict=True)
    for name, parameter, expected in expected_parameters(model, source):
        rows = len(parameter) if "embedding" not in name and "output_layer" not in name else None
        assert same_bits(parameter[:rows], expected[:rows].to(parameter.dtype)), name
    if grouped:
        return None
    ids = tokens(source.model_config)
    logits = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    return logits[..., : source.model_config.vocab_size].contiguous()


def _rank_file(folder: str, ep: int) -> Path:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    return Path(folder) / (f"mp_rank_{tp_rank:02d}" + (f"_{ep_rank:03d}" if ep > 1 else "")) / "model_optim_rng.pt"


def save_with_optimizers(folder: str, path: str, tp: int, ep: int) -> None:
    """Saves this rank's file as Megatron-LM does, after an AdamW step on gradients that depend on the weights."""
    source = formats.open(path)
    model = build_experts(source.model_config, tp, ep)
    with torch.no_grad():
        for _, parameter, expected in expected_parameters(model, source):
            parameter.copy_(expected)
    optimizer = megatron_optimizers.build_adamw(model, bf16=False, distributed=False)
    assert len(optimizer.chained_optimizers) == 2
    for part in optimizer.chained_optimizers:
        megatron_optimizers.step_with(part, megatron_optimizers.gradient)
    # Vectorised arithmetic rounds differently at other offsets of a buffer.
    group, (rest, _) = parallel_state.get_expert_model_parallel_group(), optimizer.chained_optimizers
    for parameter, adam in rest.optimizer.state.items():
        for tensor in (parameter.data, *(adam[kind] for kind in MOMENTS)):
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group)
    state = {
        "args": build_expert_args(source.model_config, tp, ep, False),
        "checkpoint_version": 3.0,
        "iteration": 5,
        "model": model.state_dict_for_save_checkpoint(),
        "optimizer": optimizer.state_dict(),
    }
    file = _rank_file(folder, ep)
    file.parent.mkdir(parents=True)
    torch.save(state, file)


def load_optimizers(folder: str, path: str, tp: int, ep: int) -> None:
    """Loads this rank's file by Megatron-core's optimizers; its moments and steps are those of the source."""
    source = formats.open(path)
    model = build_experts(source.model_config, tp, ep)
    optimizer = megatron_optimizers.build_adamw(model, bf16=False, distributed=False)
    state = torch.load(_rank_file(folder, ep), weights_only=False)
    model.load_state_dict(state["model"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    loaded = {}
    for part in optimizer.chained_optimizers:
        loaded |= part.optimizer.state
    for kind in MOMENTS:
        for name, parameter, expected in expected_parameters(model, source, kind=kind):
            assert same_bits(loaded[parameter][kind], expected), (name, kind)
            assert float(loaded[parameter]["step"]) == source.step


@torch.no_grad()
def compare_upcycling(folder: str, cases: list[tuple[int, int, int, bool]]) -> list[tuple[float, float | None]]:
    """Upcycles a dense model of two layers by Megatron-core's own code and by ours, in fp64.

    cases: (shards, copies, copies of a token, whether the softmax precedes the choice). Returns the relative errors of
    the first block's output by Megatron-core's rule and by ours; None where ours refuses.
    """
    torch.set_default_dtype(torch.float64)
    small = formats.open(folder)
    dense = build_experts(small.model_config, 1, 1, padded_vocab_size=small.model_config.vocab_size).double()
    _fill(dense, small)
    expected = _first_block(dense, small.model_config)
    errors = []
    for shards, copies, chosen, is_before in cases:
        sizes = {"num_experts": shards * copies, "top_k": shards * chosen, "renormalises_routing": not is_before}
        sizes["ffn_size"] = small.model_config.ffn_size // shards
        large = replace(as_mixture(small.model_config), **sizes)
        mixture = build_experts(large, 1, 1, padded_vocab_size=large.vocab_size).double()
        mixture.config.moe_upcycling_granularity = shards
        state = upcycling_utils._convert_to_moe_state_dict(mixture, dense)
        mixture.load_state_dict(state)
        theirs = _relative_error(_first_block(mixture, large), expected)
        if is_before:
            errors.append((theirs, None))
            continue
        del sizes["renormalises_routing"]
        operator = build_initial_operator(small.model_config, LargeSection(**sizes), OperatorSection())
        _fill(mixture, GrownReader(operator, small))
        errors.append((theirs, _relative_error(_first_block(mixture, large), expected)))
    torch.set_default_dtype(torch.float32)
    return errors


def _fill(model, source) -> None:
    for _, parameter, expected in expected_parameters(model, source, padded=False):
        parameter.copy_(expected)


def _relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


def _first_block(model, model_config) -> torch.Tensor:
    """Returns what the first layer's feed-forward block returns, (sequence, batch, hidden)."""
    outputs = []
    # Without gradients Megatron-core adds the residual stream to it in place.
    keep = lambda module, inputs, output: outputs.append(output[0].clone())  # noqa: E731
    handle = model.decoder.layers[0].mlp.register_forward_hook(keep)
    ids = tokens(model_config)
    model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    handle.remove()
    return outputs[0]
