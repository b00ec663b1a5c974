"""The gradients of bf16 weights are summed in fp32 over many micro-batches."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param

from megatron_ligo.checkpoint.run_record import write_run_record
from megatron_ligo.config.run_config import ParallelSection, PretrainSection
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.full import parameters
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from megatron_ligo.training.engine import Engine, build_parameter_groups
from tests.tiny_models import hf_llama, llama_config, tokens
from tests.training.pretrain_runs import pretrain
from tests.training.test_pretrain import DIMS, make_pair, settings

MICRO_BATCHES, LR = 32, 1.0


def error_of_update(profile: str, zero: int) -> float:
    """Returns the error of an SGD update over all micro-batches, relative to the fp32 sum of the same gradients."""
    mesh, model_config = meshes.build_mesh(1, 1), llama_config(num_layers=1)
    read = parameters.build_initial_weights(model_config, 3)
    model, plain = (build_model(model_config, BuildOptions(torch.bfloat16), mesh) for _ in range(2))
    for built in (model, plain):
        parameters.fill_parameters(built, model_config, mesh, read)
    samples = tokens(model_config, mesh.dp * MICRO_BATCHES, 9).chunk(mesh.dp)[mesh.dp_rank].split(1)
    batches = [{"tokens": t[:, :-1], "labels": t[:, 1:], "loss_mask": torch.ones(1, 8)} for t in samples]
    sums = {name: torch.zeros(parameter.shape) for name, parameter in plain.named_parameters()}
    for batch in batches:
        plain.zero_grad()
        plain(*batch.values()).backward()
        for name, parameter in plain.named_parameters():
            sums[name] += parameter.grad.float() / (mesh.dp * MICRO_BATCHES)
    for gradient in sums.values():
        dist.all_reduce(gradient)
    section = PretrainSection(
        optimizer="sgd",
        lr=LR,
        clip=0.0,
        global_batch_size=mesh.dp * MICRO_BATCHES,
        parallel=ParallelSection(zero=zero, ds_config=profile),
    )
    engine = Engine(model, mesh, section, build_parameter_groups(model, 0.0), bf16=True)
    start = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
    engine.train_step(batches)
    error = size = 0.0
    for name, parameter in engine.module.named_parameters():
        update = start[name] - safe_get_full_fp32_param(parameter)
        error += float((update.view_as(sums[name]) - LR * sums[name]).square().sum())
        size += float((LR * sums[name]).square().sum())
    engine.engine.destroy()
    return (error / size) ** 0.5


def errors_of_updates(profile: str) -> dict[int, float]:
    result = {zero: error_of_update("", zero) for zero in (1, 3)}
    result[0] = error_of_update(profile, 1)
    return result


def test_many_micro_batches_in_bf16(pools, tmp_path):
    profile = tmp_path / "bf16_sums.json"
    profile.write_text(json.dumps({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "bf16"}}))
    errors = pools(2).run(errors_of_updates, profile=str(profile))
    in_bf16 = errors.pop(0)
    assert in_bf16 > 2e-3, "sums in bf16 are as good here: the case shows nothing"
    for zero, error in errors.items():
        assert error < in_bf16 / 5, (zero, error, in_bf16)


def test_a_change_of_their_dtype_is_recorded(pools, tmp_path):
    """From bf16, as earlier versions summed them, to fp32."""
    base, profile = tmp_path / "base", tmp_path / "profile.json"
    base.mkdir()
    for seed, name in enumerate(("train", "valid")):
        make_pair(base / name, seed)
    hf_llama(DIMS).save_pretrained(base / "hf")
    profile.write_text(json.dumps({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "bf16"}}))
    table = settings(base, "hf", precision="bf16", ds_config=str(profile))
    assert pools(1).run(pretrain, settings=table, output=str(tmp_path / "run"), die_after=5) == {"killed": 5}
    for path in (tmp_path / "run/checkpoints").glob("*/record.json"):
        record = json.loads(path.read_text())
        assert record["state"].pop("gradient_sums") == [[0, "bf16"]]
        write_run_record(path.parent, record)
    profile.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    resumed = pools(1).run(pretrain, settings=table, output=str(tmp_path / "run"))
    assert resumed["gradient_sums"] == [[0, "bf16"], [4, "fp32"]]


def reductions_of_a_step(profiles: dict[int, str], micro_batches: int) -> dict[int, list[tuple[int, bool]]]:
    """Returns, by ZeRO stage, the elements of each reduction of gradients, and whether the backward pass still ran."""
    mesh, model_config = meshes.build_mesh(1, 1), llama_config(num_layers=3)
    read, average = parameters.build_initial_weights(model_config, 3), DeepSpeedZeroOptimizer.average_tensor
    samples = tokens(model_config, mesh.dp * micro_batches, 9).chunk(mesh.dp)[mesh.dp_rank].split(1)
    batches = [{"tokens": t[:, :-1], "labels": t[:, 1:], "loss_mask": torch.ones(1, 8)} for t in samples]
    recorded: dict[int, list[tuple[int, bool]]] = {}

    def record(self, tensor, dtype):
        recorded[zero].append((tensor.numel(), torch._C._current_graph_task_id() >= 0))
        return average(self, tensor, dtype)

    DeepSpeedZeroOptimizer.average_tensor = record
    for zero, profile in profiles.items():
        model = build_model(model_config, BuildOptions(torch.float32), mesh)
        parameters.fill_parameters(model, model_config, mesh, read)
        parallel = ParallelSection(zero=zero, ds_config=profile)
        section = PretrainSection(global_batch_size=mesh.dp * micro_batches, parallel=parallel)
        engine = Engine(model, mesh, section, build_parameter_groups(model, 0.0))
        recorded[zero] = []
        engine.train_step(batches)
        engine.engine.destroy()
    DeepSpeedZeroOptimizer.average_tensor = average
    return recorded


def test_gradients_are_reduced_while_the_backward_pass_runs(pools, tmp_path):
    """All but the last bucket; ZeRO 1 reduces those of the last micro-batch only, which hold the sums."""
    profiles = {zero: tmp_path / f"zero{zero}.json" for zero in (1, 2)}
    for zero, path in profiles.items():
        path.write_text(json.dumps({"zero_optimization": {"stage": zero, "reduce_bucket_size": 2000}}))
    profiles = {zero: str(path) for zero, path in profiles.items()}
    micro_batches = 2
    recorded = pools(2).run(reductions_of_a_step, profiles=profiles, micro_batches=micro_batches)
    for zero, reductions in recorded.items():
        late = [size for size, in_backward in reductions if not in_backward]
        assert len(late) == (1 if zero == 1 else micro_batches), reductions
        assert sum(late) < 0.3 * sum(size for size, _ in reductions)
    assert micro_batches * sum(size for size, _ in recorded[1]) == sum(size for size, _ in recorded[2])
