"""What the ranks run: real DeepSpeed engines that save, and that load what was converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero import partition_parameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.config.run_config import ParallelSection, PretrainSection
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.full import parameters, universal_loading
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from megatron_ligo.training.engine import Engine, build_parameter_groups
from tests.models.full.pretrain_cases import BATCH, CLIP, DECAY, LR, inputs_and_labels, micro
from tests.tiny_models import hf_llama, tokens

BEFORE, AFTER = 2, 3


class Job:
    """A model in an engine at a layout: {tp, pp, cp, sequence_parallel, zero}."""

    def __init__(self, model_config: ModelConfig, layout: dict, bf16: bool = False, seed: int = 7, source=None):
        self.model_config, self.size = model_config, 2
        self.mesh = meshes.build_mesh(layout.get("tp", 1), layout.get("pp", 1), cp=layout.get("cp", 1))
        divides_sequences = layout.get("sequence_parallel", False)
        build = BuildOptions(torch.bfloat16 if bf16 else torch.float32, self.mesh.tp, divides_sequences)
        torch.manual_seed(seed)
        model = build_model(model_config, build, self.mesh)
        zero = layout.get("zero", 1)
        if source is None:
            parameters.fill_parameters(
                model, model_config, self.mesh, parameters.build_initial_weights(model_config, seed)
            )
        elif zero == 3:
            universal_loading.prepare_for_universal(model, model_config, self.mesh.tp_group)
        run = PretrainSection(
            global_batch_size=BATCH,
            micro_batch_size=self.size,
            lr=LR["adamw"],
            clip=CLIP,
            parallel=ParallelSection(
                tp=self.mesh.tp,
                pp=self.mesh.pp,
                cp=self.mesh.cp,
                zero=zero,
                sequence_parallel=divides_sequences,
            ),
        )
        self.engine = Engine(
            model, self.mesh, run, build_parameter_groups(model, DECAY), bf16, universal=source is not None
        )
        if source is not None:
            universal_loading.load_universal(self.engine.engine, source, self.mesh.tp_group)

    def losses(self, first: int, count: int) -> list[float]:
        steps = range(first, first + count)
        return [self.engine.train_step(micro(self.model_config, step, self.mesh, self.size))[0] for step in steps]

    def evaluate(self) -> float:
        return self.engine.evaluate(micro(self.model_config, 0, self.mesh, self.size))

    def end(self) -> None:
        self.engine.engine.destroy()


def on_first(work) -> None:
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def saved_and_resumed(folder: str, model_config: ModelConfig, layouts: list[dict], bf16: bool = False) -> dict:
    """An engine's losses after it has saved FOLDER/engine; and those of engines at each layout that take them up from
    FOLDER/universal, converted."""
    base = Path(folder)
    job = Job(model_config, layouts[0], bf16)
    job.losses(0, BEFORE)
    job.engine.engine.save_checkpoint(str(base / "engine"), tag="state")
    undisturbed = job.losses(BEFORE, AFTER)
    job.end()

    def converted() -> None:
        model_record.write_folder(base / "sizes", model_config, {}, ())
        (base / "sizes" / model_record.RECORD).rename(base / "engine" / model_record.RECORD)
        convert(formats.open(base / "engine"), base / "universal", "universal")

    on_first(converted)
    resumed = []
    for layout in layouts:
        job = Job(model_config, layout, bf16, source=formats.open(base / "universal"))
        resumed.append(job.losses(BEFORE, AFTER))
        job.end()
    return {"undisturbed": undisturbed, "resumed": resumed}


def module_only(folder: str, model_config: ModelConfig, layout: dict, bf16: bool = False) -> list[float]:
    """An engine of other weights loads FOLDER by itself: its loss, and the losses of its next steps."""
    job = Job(model_config, layout, bf16, seed=11)
    before = job.evaluate()
    path, _ = job.engine.engine.load_checkpoint(folder, load_module_only=True)
    assert path is not None
    result = [job.evaluate(), *job.losses(0, AFTER)]
    job.end()
    assert before != result[0]
    return result


class Wrapper(torch.nn.Module):
    """A model below another name, as torch.compile and data parallelism put it."""

    def __init__(self, name: str, model: torch.nn.Module):
        super().__init__()
        self.add_module(name, model)

    def forward(self, *arguments: object) -> object:
        (model,) = self.children()
        return model(*arguments)


class Int8Kernels:
    """What DeepSpeed's CUDA quantizer computes, groups of numbers as int8 with a scale each, in torch."""

    Symmetric = 0

    def quantize(self, values: Tensor, groups: int, bits: int, kind: int) -> tuple[Tensor, Tensor]:
        grouped = values.float().view(groups, -1)
        scales = grouped.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        return (grouped / scales).round().to(torch.int8).view_as(values), scales.flatten()

    def dequantize(self, values: Tensor, scales: Tensor, groups: int, bits: int, kind: int) -> Tensor:
        return (values.view(groups, -1) * scales.view(groups, 1)).view_as(values)


def transformers_model(
    folder: str,
    model_config: ModelConfig,
    zero: int,
    frozen: str = "",
    wrappers: tuple[str, ...] = (),
    bf16: bool = False,
    zero_options: Mapping = MappingProxyType({}),
) -> None:
    """A model of transformers in a plain engine saves FOLDER; truth.pt in it is what the engine gives out.

    frozen: a part of the names of parameters that are not trained; wrappers: names of modules around the model;
    zero_options: other keys of zero_optimization.
    """
    model = hf_llama(model_config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0, **zero_options},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2}},
    }
    if bf16:
        config["bf16"] = {"enabled": True}
    partition_parameters.CUDAQuantizer.quantizer_cuda_module = Int8Kernels()
    model.config.save_pretrained(folder)
    for name in wrappers:
        model = Wrapper(name, model)
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    ids = tokens(model_config)
    for _ in range(BEFORE):
        engine.backward(F.cross_entropy(engine(ids).logits.flatten(0, 1), ids.flatten()))
        engine.step()
    truth = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = [safe_get_full_optimizer_state(parameter, kind).clone() for kind in ("exp_avg", "exp_avg_sq")]
        truth[name] = [safe_get_full_fp32_param(parameter).detach().clone(), *moments]
    engine.save_checkpoint(folder)
    on_first(lambda: torch.save(truth, Path(folder) / "truth.pt"))
    engine.destroy()


def losses_by_sample(model_config: ModelConfig, layout: dict) -> tuple[list[float], list[float]]:
    """Returns the losses of a micro-batch's samples: from one evaluation, and from one evaluation of each."""
    job = Job(model_config, layout)
    seen, labels = inputs_and_labels(model_config, 0)
    batch = {"tokens": seen[:3], "labels": labels[:3], "loss_mask": torch.ones(labels[:3].shape)}
    batch["loss_mask"][1, :5] = 0.0
    alone = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
    result = job.engine.evaluate_samples(batch), [job.engine.evaluate([each]) for each in alone]
    job.end()
    return result
