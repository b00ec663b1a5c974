"""Rank functions: optimizers of Megatron-core, saved and loaded by Megatron-core's own code."""

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
from tests.checkpoint.formats.megatron_ranks import (
    assert_weights_equal,
    build_gpt,
    build_run_args,
    expected_tensors,
    fill_weights,
    rank_file,
    sharding_metadata,
)
from tests.checkpoint.hf_models import same_bits

LR, MIN_LR = 1e-2, 1e-3


def build_adamw(model, bf16: bool, distributed: bool):
    """Builds Megatron-core's AdamW for a model."""
    _allow_optimizers_on_cpu()
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
    """Saves model and optimizer by Megatron-core after an AdamW step on gradients that depend on the weights.

    sharding: the distributed optimizer's sharding type; None: an optimizer that is not distributed.
    """
    multiprocessing.current_process()._config["daemon"] = False
    source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
    model = build_gpt(source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32)
    fill_weights(model, source, mesh)
    optimizer = build_adamw(model, bf16, sharding is not None)
    for part in optimizer.chained_optimizers:
        step_with(part, gradient)
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    sharding_info = sharding_metadata(distrib_optim_sharding_type=sharding, chained_optim_avoid_prefix=True)
    state = {
        "model": model.sharded_state_dict(metadata=sharding_info),
        "iteration": 5,
        "args": build_run_args(source.model_config, tp, pp),
    }
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=sharding_info)
    dist_checkpointing.save(state, folder)


def save_by_rank(folder: str, path: str, tp: int, pp: int, bf16: bool) -> None:
    """Saves a rank file with everything that Megatron-LM writes, after the same AdamW step."""
    source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
    model = build_gpt(source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32)
    fill_weights(model, source, mesh)
    optimizer = build_adamw(model, bf16, distributed=False)
    for part in optimizer.chained_optimizers:
        step_with(part, gradient)
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    state = {
        "args": build_run_args(source.model_config, tp, pp),
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
    """Loads the rank files of each (folder, source, tp, pp, bf16) as Megatron-LM does, and takes a step."""
    for folder, path, tp, pp, bf16 in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        state = torch.load(rank_file(folder, mesh), weights_only=False)
        model = build_gpt(
            source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32, state["args"].padded_vocab_size
        )
        optimizer = build_adamw(model, bf16, distributed=False)
        model.load_state_dict(state["model"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        assert_weights_equal(model, source, mesh)
        _assert_resumes(optimizer, model, source, mesh)


def load_with_optimizer(jobs: list[tuple[str, str, int, int, bool, bool]]) -> None:
    """Loads each (folder, source, tp, pp, bf16, distributed) by Megatron-core, and takes a step."""
    for folder, path, tp, pp, bf16, distributed in jobs:
        source, mesh = formats.open(path), meshes.build_mesh(tp, pp)
        model = build_gpt(source.model_config, mesh, torch.bfloat16 if bf16 else torch.float32)
        optimizer = build_adamw(model, bf16, distributed)
        if distributed:
            _initialise_step_counts(*optimizer.chained_optimizers)
        sharding_info = sharding_metadata(**dist_checkpointing.load_content_metadata(folder))
        state = {"model": model.sharded_state_dict(metadata=sharding_info)}
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=True, metadata=sharding_info)
        state = dist_checkpointing.load(state, folder)
        model.load_state_dict(state["model"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        assert_weights_equal(model, source, mesh)
        _assert_resumes(optimizer, model, source, mesh, distributed)


def _assert_resumes(optimizer, model, source, mesh, distributed: bool = False) -> None:
    """Asserts that moments and step are the source's, and that the next step is torch's AdamW with its settings."""
    (part,) = optimizer.chained_optimizers
    kinds = (WEIGHT, *MOMENTS)
    expected_steps = {}
    by_parameter = zip(*(expected_tensors(model, source, mesh, kind) for kind in kinds), strict=True)
    for (name, parameter, weight), *moments in by_parameter:
        adam = _adam_state(part, parameter, distributed)
        if adam is None:
            continue
        expected = [tensor.flatten()[adam["slice"]] for tensor in (weight, *(moment for *_, moment in moments))]
        for kind, tensor in zip(kinds, expected, strict=True):
            assert same_bits(adam[kind].detach().flatten(), tensor), (name, kind)
        assert adam["step"] == source.step
        expected_steps[name] = adam[WEIGHT], _stepped(expected, source, decay=weight.dim() > 1)
    step_with(part, gradient)
    for name, (main, stepped) in expected_steps.items():
        actual = main.detach().flatten()
        # Vectorised arithmetic rounds differently at other offsets of a buffer.
        is_close = torch.allclose(actual, stepped, rtol=1e-6, atol=1e-7)
        assert is_close if distributed else same_bits(actual, stepped), name


def _initialise_step_counts(part) -> None:
    """Lets Megatron-core's distributed optimizer load torch's Adam.

    It expects an Adam that counts steps in its param groups. torch's counts them in each parameter's state, where a
    count must exist before loading."""
    step_with(part, torch.ones_like)
    put = part._set_main_param_and_optimizer_states

    def with_count(parameter, tensors):
        (count,) = {float(state["step"]) for state in part.optimizer.state.values()}
        for state in part.optimizer.state.values():
            # They have been given one tensor together.
            state["step"] = torch.tensor(count)
        put(parameter, {**tensors, "step": torch.tensor(count)})

    part._set_main_param_and_optimizer_states = with_count


def step_with(part, grad) -> None:
    """Steps the torch optimizer inside of one of Megatron-core's."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = grad(parameter.detach())
    part.optimizer.step()


def _adam_state(part, parameter, distributed: bool) -> dict | None:
    """Returns weight, moments and step of this rank's slice of a parameter; None if it has no part of it."""
    main, own_slice = getattr(parameter, "main_param", parameter), slice(None)
    if distributed:
        mains = [
            main
            for model_groups, main_groups in (
                (part.model_fp32_groups, part.shard_fp32_groups),
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            )
            for group, shards in zip(model_groups, main_groups, strict=True)
            for model, main in zip(group, shards, strict=True)
            if model is parameter
        ]
        if not mains:
            return None
        (main,) = mains
        span = part._get_model_param_range_map(parameter)["param"]
        own_slice = slice(span.start, span.end)
    state = part.optimizer.state[main]
    return {"slice": own_slice, WEIGHT: main, **{kind: state[kind] for kind in MOMENTS}, "step": state["step"]}


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


def _allow_optimizers_on_cpu() -> None:
    """Megatron-core's optimizers accept CUDA tensor types only."""
    kind, tensor = torch.Tensor.type, torch.tensor
    torch.Tensor.type = lambda self, *to: kind(self, *to) if to else f"torch.cuda.{kind(self).rpartition('.')[2]}"
    torch.tensor = lambda *values, device=None, **more: tensor(*values, **more)
