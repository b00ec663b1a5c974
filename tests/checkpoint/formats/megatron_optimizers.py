"""What the ranks run: real optimizers of Megatron-core, saved and loaded by Megatron-core's own means."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.distributed import mesh as meshes
from tests.checkpoint.formats.megatron_ranks import assert_holds, fill, gpt, held, metadata, rank_file, run_arguments
from tests.checkpoint.hf_models import same_bits

LR, MIN_LR = 1e-2, 1e-3


def adam_of(model, bf16: bool, distributed: bool):
    """Megatron-core's own AdamW of a model."""
    _optimizers_on_cpu()
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), model
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        min_lr=MIN_LR,
        weight_decay=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )
    return get_megatron_optimizer(config, [wrapped], use_gloo_process_groups=False)


def save_with_optimizer(folder: str, path: str, tp: int, pp: int, bf16: bool, sharding: str | None) -> None:
    """Megatron-core's own optimizer after a step of AdamW on gradients that follow from the weights.

    sharding: how its distributed optimizer is saved (None: one that is not distributed).
    """
    multiprocessing.current_process()._config["daemon"] = False
    source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
    model = gpt(source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32)
    fill(model, source, mesh)
    optimizer = adam_of(model, bf16, sharding is not None)
    for part in optimizer.chained_optimizers:
        _step(part, gradient)
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    how = metadata(distrib_optim_sharding_type=sharding, chained_optim_avoid_prefix=True)
    state = {
        "model": model.sharded_state_dict(metadata=how),
        "iteration": 5,
        "args": run_arguments(source.model_config, tp, pp),
    }
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=how)
    dist_checkpointing.save(state, folder)


def save_by_rank(folder: str, path: str, tp: int, pp: int, bf16: bool) -> None:
    """A rank's file with all that Megatron-LM puts into it, after a step of AdamW as above."""
    source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
    model = gpt(source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32)
    fill(model, source, mesh)
    optimizer = adam_of(model, bf16, distributed=False)
    for part in optimizer.chained_optimizers:
        _step(part, gradient)
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    state = {
        "args": run_arguments(source.model_config, tp, pp),
        "checkpoint_version": 3.0,
        "iteration": 12,
        "model": model.state_dict_for_save_checkpoint(),
        "optimizer": optimizer.state_dict(),
        "rng_state": [rng],
        "num_floating_point_operations_so_far": 1e9,
    }
    file = rank_file(folder, mesh)
    file.parent.mkdir(parents=True)
    torch.save(state, file)


def load_by_rank(jobs: list[tuple[str, str, int, int, bool]]) -> None:
    """As `load_with_optimizer`, of each (folder, source, tp, pp, bf16), what Megatron-LM does with a rank's file."""
    for folder, path, tp, pp, bf16 in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        state = torch.load(rank_file(folder, mesh), weights_only=False)
        model = gpt(
            source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32, state["args"].padded_vocab_size
        )
        optimizer = adam_of(model, bf16, distributed=False)
        model.load_state_dict(state["model"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        assert_holds(model, source, mesh)
        _assert_goes_on(optimizer, model, source, mesh)


def load_with_optimizer(jobs: list[tuple[str, str, int, int, bool, bool]]) -> None:
    """Megatron-core's own optimizer loads each (folder, source, tp, pp, bf16, distributed): the source's moments and
    step, and a step of torch's AdamW on them with the source's settings."""
    for folder, path, tp, pp, bf16, distributed in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        model = gpt(source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32)
        optimizer = adam_of(model, bf16, distributed)
        if distributed:
            _begin_counting(*optimizer.chained_optimizers)
        how = metadata(**dist_checkpointing.load_content_metadata(folder))
        state = {"model": model.sharded_state_dict(metadata=how)}
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=True, metadata=how)
        state = dist_checkpointing.load(state, folder)
        model.load_state_dict(state["model"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        assert_holds(model, source, mesh)
        _assert_goes_on(optimizer, model, source, mesh, distributed)


def _assert_goes_on(optimizer, model, source, mesh, distributed: bool = False) -> None:
    """It holds the source's moments and step, and makes a step of torch's AdamW with the source's settings."""
    (part,) = optimizer.chained_optimizers
    kinds = (WEIGHT, *MOMENTS)
    wanted = {}
    truth = zip(*(held(model, source, mesh, kind) for kind in kinds), strict=True)
    for (name, parameter, weight), *moments in truth:
        ours = _adam(part, parameter, distributed)
        if ours is None:
            continue
        expected = [tensor.flatten()[ours["at"]] for tensor in (weight, *(moment for *_, moment in moments))]
        for kind, tensor in zip(kinds, expected, strict=True):
            assert same_bits(ours[kind].detach().flatten(), tensor), (name, kind)
        assert ours["step"] == source.step
        wanted[name] = ours[WEIGHT], _stepped(expected, source, decay=weight.dim() > 1)
    _step(part, gradient)
    for name, (main, stepped) in wanted.items():
        found = main.detach().flatten()
        # In a shard of a buffer the processor rounds at other places.
        near = torch.allclose(found, stepped, rtol=1e-6, atol=1e-7)
        assert near if distributed else same_bits(found, stepped), name


def _begin_counting(part) -> None:
    """Megatron-core's distributed optimizer is made for an Adam that counts in its groups. torch's has a count with
    each parameter, which must be there before, and is not among the tensors that are put into its state."""
    _step(part, torch.ones_like)
    put = part._set_main_param_and_optimizer_states

    def with_count(parameter, tensors):
        (count,) = {float(state["step"]) for state in part.optimizer.state.values()}
        for state in part.optimizer.state.values():
            # They have been given one tensor together.
            state["step"] = torch.tensor(count)
        put(parameter, {**tensors, "step": torch.tensor(count)})

    part._set_main_param_and_optimizer_states = with_count


def _step(part, grad) -> None:
    """A step of the optimizer inside of one of Megatron-core's."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = grad(parameter.detach())
    part.optimizer.step()


def _adam(part, parameter, distributed: bool) -> dict | None:
    """What the optimizer holds of a parameter (none of it: None); at: which numbers of it."""
    main, at = getattr(parameter, "main_param", parameter), slice(None)
    if distributed:
        found = [
            main
            for models, mains in (
                (part.model_fp32_groups, part.shard_fp32_groups),
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            )
            for group, shards in zip(models, mains, strict=True)
            for model, main in zip(group, shards, strict=True)
            if model is parameter
        ]
        if not found:
            return None
        (main,) = found
        here = part._get_model_param_range_map(parameter)["param"]
        at = slice(here.start, here.end)
    state = part.optimizer.state[main]
    return {"at": at, WEIGHT: main, **{kind: state[kind] for kind in MOMENTS}, "step": state["step"]}


def _stepped(expected: list[torch.Tensor], source, decay: bool) -> torch.Tensor:
    weight, *moments = (tensor.clone() for tensor in expected)
    decays = [group["weight_decay"] for group in source.groups]
    settings = {name: source.groups[0][name] for name in ("lr", "betas", "eps")}
    stepper = torch.optim.AdamW([weight], weight_decay=max(decays) if decay else min(decays), **settings)
    stepper.state[weight] = {"step": torch.tensor(float(source.step)), **dict(zip(MOMENTS, moments, strict=True))}
    weight.grad = gradient(weight)
    stepper.step()
    return weight


def gradient(weight: torch.Tensor) -> torch.Tensor:
    return torch.sin(weight * 10)


def _optimizers_on_cpu() -> None:
    """Megatron-core's optimizers ask for the types of a GPU's tensors."""
    kind, tensor = torch.Tensor.type, torch.tensor
    torch.Tensor.type = lambda self, *to: kind(self, *to) if to else f"torch.cuda.{kind(self).rpartition('.')[2]}"
    torch.tensor = lambda *values, device=None, **more: tensor(*values, **more)
