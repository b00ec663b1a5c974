"""What the ranks run: the model to pretrain, loaded or filled at a layout and trained for a few steps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats
from megatron_ligo.common.errors import LigoError
from megatron_ligo.config.run_config import ParallelSection, PretrainSection
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.distributed.mesh import DeepSpeedMpu
from megatron_ligo.models.full import expert_parallel, parameters, universal_loading
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.loss import compute_loss
from megatron_ligo.models.mcore import layer_calls
from megatron_ligo.models.mcore.layer_spec import BuildOptions, build_layer_spec, build_transformer_config
from megatron_ligo.training.engine import Engine, build_parameter_groups
from tests import decoder_models, image_models, layer_pattern_models
from tests.layer_norm_models import config_of, model_of
from tests.models import dispatch_on_cpu
from tests.tiny_models import llama_config, tokens

# A vocabulary of 37 is padded at any tp but 1.
SIZES = {"num_heads": 8, "num_kv_heads": 4, "num_layers": 5}
# Of decoders on three ranks, and of those that rotate a half of each head.
ODD = {"num_heads": 6, "num_kv_heads": 3, "num_layers": 4, "head_dim": 6, "hidden_size": 36, "ffn_size": 33}
ODD_HALVES = ODD | {"head_dim": 8, "hidden_size": 48}
ROTATE_HALVES = ("gpt_neox", "phi", "phi3", "stablelm", "glm4", "nemotron")
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
}
WIDTH = {"hidden_size": 32}  # of families whose heads have hidden_size / num_heads features
MIXTURES = {
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": WIDTH,
    "qwen2_moe": {**WIDTH, "qkv_bias": True, "shared_expert_ffn_size": 20},
}
# Configurations of a family other than the usual one: its name, and what differs.
VARIANTS = {
    "gpt_neox in sequence": ("gpt_neox", {"parallel_residual": False}),
    "stablelm with a quarter and biases": ("stablelm", {"rotary_fraction": 0.25, "qkv_bias": True}),
    "starcoder2 with a window": ("starcoder2", {"sliding_window": 5}),
    "granite with biases": ("granite", {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
}
BATCH, LENGTH, STEPS = 8, 16, 5
LR = {"adamw": 1e-2, "sgd": 0.5}
CLIP, DECAY = 0.05, 0.1
AUX_LOSS = 0.3  # of routers


def odd_sizes(family: str) -> dict[str, int]:
    family, _ = VARIANTS.get(family, (family, {}))
    return ODD_HALVES if family in ROTATE_HALVES else ODD


def sizes(tied: bool, family: str = "llama", odd: bool = False, experts: int = 6) -> ModelConfig:
    if family in VARIANTS:
        family, changes = VARIANTS[family]
        return replace(sizes(tied, family, odd), **changes)
    if family in image_models.OWN:
        # Labels are padded at tp 2; tokens are not: 10, 6 and 8 of them.
        side = 7 if family in ("deit", "dinov2_with_registers") else 10
        own = {"num_kv_heads": 8, "hidden_size": 32, "vocab_size": 7, "image_size": side}
        if family not in ("vit", "deit"):
            own["ffn_size"] = 48 if family == "dinov2 with a gate" else 64
        return image_models.image_config(family, **SIZES | own)
    if family in decoder_models.OWN:
        return decoder_models.config_of(
            family, tied=tied, **odd_sizes(family) if odd else {**SIZES, "head_dim": 4, "hidden_size": 32}
        )
    if family in MIXTURES:
        routing = {"num_experts": experts, "top_k": 2, "renormalises_routing": family == "mixtral", **MIXTURES[family]}
        return llama_config(arch=family, model_type=family, tied=tied, **SIZES | {"num_layers": 2}, **routing)
    if family in layer_pattern_models.OWN:
        return layer_pattern_models.config_of(
            family, tied=tied, **odd_sizes(family) if odd else {**SIZES, "hidden_size": 32}
        )
    if family != "llama":
        own = odd_sizes(family) | {"num_kv_heads": 6} if odd else SIZES | {"num_kv_heads": 8, "hidden_size": 32}
        return config_of(family, CLASSES[family], tied=tied, **own)
    return llama_config(tied=tied, **odd_sizes(family) if odd else SIZES)


def decay_of(optimizer: str, family: str) -> float:
    """transformers keeps the class's token as a stack of matrices: which parameters decay would differ."""
    return DECAY if optimizer == "adamw" and family not in image_models.OWN else 0.0


def ids_of(model_config, step: int, batch: int = BATCH) -> torch.Tensor:
    return tokens(model_config, batch, LENGTH + 1, seed=100 + step)


def inputs_and_labels(model_config, step: int, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step's samples show (tokens, images), and their labels."""
    if model_config.image_size is None:
        ids = ids_of(model_config, step, batch)
        return ids[:, :-1], ids[:, 1:].contiguous()
    return image_models.pictures(model_config, batch, seed=100 + step), image_models.labels(
        model_config, batch, seed=100 + step
    )


def micro(model_config, step: int, mesh, size: int, batch: int = BATCH) -> list[dict]:
    """This rank's micro-batches of a step."""
    seen, message = inputs_and_labels(model_config, step, batch)
    starts = range(mesh.dp_rank * size, batch, size * mesh.dp)
    mask = torch.ones(size, message.shape[1])
    rows = [slice(start, start + size) for start in starts]
    return [{"tokens": seen[part], "labels": message[part], "loss_mask": mask} for part in rows]


def reference(
    tied: bool,
    optimizer: str = "adamw",
    family: str = "llama",
    odd: bool = False,
    batch: int = BATCH,
    experts: int = 6,
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of transformers' model under PyTorch's own optimizer, in one process."""
    model_config = sizes(tied, family, odd, experts)
    model = model_of(model_config)
    decay = decay_of(optimizer, family)
    if optimizer == "sgd":
        stepper = torch.optim.SGD(model.parameters(), lr=LR["sgd"])
    else:
        stepper = torch.optim.AdamW(build_parameter_groups(model, decay), lr=LR["adamw"], betas=(0.9, 0.95))
    result = []
    for step in range(STEPS):
        seen, message = inputs_and_labels(model_config, step, batch)
        loss = F.cross_entropy(model(seen).logits.flatten(0, -2), message.flatten())
        (loss + (router_loss(model, seen) if family in MIXTURES else 0)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        stepper.step()
        stepper.zero_grad()
        result.append((float(loss.detach()), float(norm)))
    return result


def router_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The load-balancing loss (Switch Transformer, equation 4) of each sequence, over the layers' routers."""
    total, top_k = torch.zeros(()), model.config.num_experts_per_tok
    for logits in model(ids, output_router_logits=True).router_logits:
        scores = logits.float().softmax(-1).reshape(*ids.shape, -1)  # (b, s, experts)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1.0)
        shares = chosen.mean(dim=1) / top_k * scores.mean(dim=1)
        total = total + AUX_LOSS * scores.shape[-1] * shares.sum(dim=-1).mean()
    return total


def train(
    folder: str | None,
    tied=False,
    tp=1,
    pp=1,
    ep=1,
    cp=1,
    zero=1,
    micro_size=2,
    sequence_parallel=False,
    recompute=False,
    optimizer="adamw",
    bf16=False,
    seed=7,
    family="llama",
    odd=False,
    batch=BATCH,
    experts=6,
) -> dict:
    """Losses and norms of a few steps from a universal checkpoint (None: from fresh weights)."""
    model_config = sizes(tied, family, odd, experts)
    mesh = meshes.build_mesh(tp, pp, ep, cp)
    build = BuildOptions(torch.bfloat16 if bf16 else torch.float32, tp, sequence_parallel, AUX_LOSS, ep)
    model = build_model(model_config, build, mesh, recompute, divided=folder is None and zero == 3)
    built = sum(parameter.numel() for parameter in model.parameters())
    if folder is None:
        parameters.fill_parameters(model, model_config, mesh, parameters.build_initial_weights(model_config, seed))
    elif universal_loading.needs_preparation(model_config, zero):
        universal_loading.prepare_for_universal(model, model_config, mesh.tp_group)
    decay = decay_of(optimizer, family)
    run = PretrainSection(
        global_batch_size=batch,
        micro_batch_size=micro_size,
        optimizer=optimizer,
        lr=LR[optimizer],
        clip=CLIP,
        parallel=ParallelSection(tp=tp, pp=pp, ep=ep, cp=cp, zero=zero, sequence_parallel=sequence_parallel),
    )
    engine = Engine(model, mesh, run, build_parameter_groups(model, decay), bf16, universal=folder is not None)
    if folder:
        universal_loading.load_universal(engine.engine, formats.open(Path(folder)), mesh.tp_group)
    evaluated = engine.evaluate(micro(model_config, 0, mesh, micro_size, batch))
    steps = [engine.train_step(micro(model_config, step, mesh, micro_size, batch)) for step in range(STEPS)]
    # Else its hooks hold it, and with it all process groups.
    engine.engine.destroy()
    return {"evaluated": evaluated, "steps": steps, "built": built}


def train_at_each(cases: list[dict], dispatcher: str = "") -> list[dict]:
    """Runs `train` with each set of arguments, one after the other. dispatcher: of tokens to experts."""
    with dispatch_on_cpu.all_to_all() if dispatcher == "alltoall" else nullcontext():
        return [train(**case) for case in cases]


def train_wrongly(mistake: str, **case) -> dict:
    """Runs `train` with one mistake in what becomes of the gradients of expert-parallel ranks."""
    mark = parameters.mark_tensor_parallel
    if mistake == "experts are averaged as replicas":
        expert_parallel._divide = lambda ranks, grad: _mean(grad, parallel_state.get_expert_model_parallel_group())
    elif mistake == "experts are summed":
        expert_parallel._divide = lambda ranks, grad: grad
    elif mistake == "routers are reduced over the tensor-parallel ranks":
        expert_parallel.sum_gradients = _sum_routers_over_tp
    elif mistake == "the norm counts shards on every rank":
        parameters.mark_tensor_parallel = lambda *arguments: _mark_all(mark, *arguments)
    return train(**case)


def _mean(grad: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    grad = grad.clone()
    torch.distributed.all_reduce(grad, group=group)
    return grad / torch.distributed.get_world_size(group)


def _sum_routers_over_tp(replicated: list, group: torch.distributed.ProcessGroup, factor: float) -> None:
    experts = pretrain_experts()
    routers = [parameter for parameter in replicated if parameter.dim() == 2 and parameter.shape[0] == experts]
    others = [parameter for parameter in replicated if not any(parameter is router for router in routers)]
    layer_calls.sum_gradients(others, group, factor)
    layer_calls.sum_gradients(routers, parallel_state.get_tensor_model_parallel_group(), factor)


def pretrain_experts() -> int:
    return sizes(True, "mixtral").num_experts


def _mark_all(mark, model, model_config, mesh) -> None:
    mark(model, model_config, mesh)
    for parameter, item in parameters.iterate_parameters(model, model_config):
        parameter.tensor_model_parallel = item.tp_dim is not None


def names(tied: bool, tp: int, pp: int, family: str = "llama") -> dict[str, tuple[int, ...]]:
    """Parameters of this rank's model, by name, with their shapes."""
    model_config, mesh = sizes(tied, family), meshes.build_mesh(tp, pp)
    model = build_model(model_config, BuildOptions(tp=tp), mesh)
    everyone: list = [None] * mesh.world_size
    torch.distributed.all_gather_object(everyone, {n: tuple(p.shape) for n, p in model.named_parameters()})
    return {name: shape for stored in everyone for name, shape in stored.items()}


def load_into_a_users_model(folder: str, zero: int, prepare: bool = True) -> float | str:
    """The example of universal_loading.py: a plain GPTModel of Megatron-core, TP 2. Returns a loss, or the error."""
    source = formats.open(Path(folder))
    model_config, mesh = source.model_config, meshes.build_mesh(2, 1)
    model = GPTModel(
        config=build_transformer_config(model_config, BuildOptions(tp=2)),
        transformer_layer_spec=build_layer_spec(model_config, torch.float32),
        vocab_size=model_config.vocab_size + 1,
        max_sequence_length=model_config.max_positions,
        share_embeddings_and_output_weights=model_config.tied,
        position_embedding_type="rope",
        rotary_base=int(model_config.rope_base),
    )
    if prepare:
        universal_loading.prepare_for_universal(model, model_config, mesh.tp_group)
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 2 // mesh.dp,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "checkpoint": {"load_universal": True},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config,
        mpu=DeepSpeedMpu(mesh),
        dist_init_required=False,
    )
    try:
        universal_loading.load_universal(engine, source, mesh.tp_group)
        ids = tokens(model_config)
        with torch.no_grad():
            logits = engine(ids, None, None).transpose(0, 1)
            mask = torch.ones(ids.shape)
            return float(compute_loss(logits, ids, mask, model_config.vocab_size, mesh))
    except LigoError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()
