"""Changes one setting of a real GPTModel at a time, saves it as Megatron-core and Megatron-LM do, and reads it back.

Each case keeps the weights. Where the changed model's logits (or its tensors) are others, the logits that transformers
computes from our conversion must be the same others, or the reader must refuse the checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from huggingface_hub.errors import StrictDataclassClassValidationError
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.distributed import mesh as meshes
from tests.checkpoint.formats.megatron_ranks import sharding_metadata
from tests.checkpoint.library_refusals import check_raised_by_library
from tests.checkpoint.source_keys.megatron_settings import CONFIG, MODEL, PRECISION, iter_cases

LENGTH = 24
TOLERANCE = 2e-4
# Field of TransformerConfig or argument of GPTModel -> argument of Megatron-LM, where they differ.
MEGATRON_LM_NAMES = {
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
    "vocab_size": "padded_vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}
FIELDS = tuple(field.name for field in dataclasses.fields(TransformerConfig))
SOURCES = ("mcore", "megatron", "run_config")


def build(changes: dict[str, object]) -> GPTModel:
    """Builds a model with changed settings. A setting that the config's checks refuse is set without them."""
    model_changes = {name: value for name, value in changes.items() if name in MODEL}
    config_changes = {name: value for name, value in changes.items() if name in FIELDS and name not in MODEL}
    attributes = {name: value for name, value in changes.items() if name not in FIELDS and name not in MODEL}
    with contextlib.redirect_stdout(None):
        try:
            config = TransformerConfig(**{**CONFIG, **config_changes})
        except Exception as error:
            check_raised_by_library(error)
            config = TransformerConfig(**CONFIG)
            attributes |= config_changes
        for name, value in attributes.items():
            setattr(config, name, value)
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
        torch.manual_seed(0)
        model = GPTModel(config=config, transformer_layer_spec=spec, **{**MODEL, **model_changes})
    return model.eval()


def fill(model: GPTModel) -> None:
    """Draws weights of a spread that makes every setting visible, the same for the same names and shapes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() + 0.5 if "norm" in name else 0.3 * values)


@torch.no_grad()
def compute_logits(model: GPTModel) -> torch.Tensor:
    ids = token_ids()
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    return model(ids, torch.arange(LENGTH).expand_as(ids), mask).float()


def token_ids() -> torch.Tensor:
    return torch.randint(0, MODEL["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(2))


def to_args(changes: dict[str, object]) -> argparse.Namespace:
    """Returns the arguments of a Megatron-LM run with these settings: every field of the config, by both names."""
    config = {field.name: _default(field) for field in dataclasses.fields(TransformerConfig)}
    settings = {**config, **CONFIG, **MODEL, **changes}
    args = {name: value for name, value in settings.items() if not callable(value) or isinstance(value, type)}
    args |= {theirs: settings[ours] for ours, theirs in MEGATRON_LM_NAMES.items() if ours in settings}
    for name in ("layernorm_zero_centered_gamma", "rope_scaling", "vocab_size", "max_sequence_length"):
        args.pop(name)
    is_gated, activation = settings["gated_linear_unit"], settings["activation_func"]
    args["swiglu"] = bool(is_gated and activation is F.silu)
    if activation not in (F.silu, F.gelu) or (activation is F.silu) != bool(is_gated):
        args["activation_func"] = f"torch.nn.functional.{activation.__name__}"
    args["untie_embeddings_and_output_weights"] = not args.pop("share_embeddings_and_output_weights")
    args["group_query_attention"] = settings["num_query_groups"] is not None
    args |= {"add_position_embedding": True, "use_rotary_position_embeddings": False, "spec": None}
    return argparse.Namespace(**args)


def to_run_config(changes: dict[str, object]) -> dict:
    """Returns Megatron-Bridge's run_config.yaml with these settings."""
    config = {field.name: _default(field) for field in dataclasses.fields(TransformerConfig)}
    settings = {**config, **CONFIG, **MODEL, **changes}
    settings["seq_length"] = settings.pop("max_sequence_length")
    target = "megatron.bridge.models.gpt_provider.GPTModelProvider"
    return {"model": {"_target_": target, **{name: _to_plain(value) for name, value in settings.items()}}}


def _to_plain(value: object) -> object:
    if isinstance(value, torch.dtype):
        return {"_target_": str(value), "_call_": False}
    if callable(value):
        return {"_target_": f"torch.nn.functional.{value.__name__}", "_call_": False}
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, str | int | float | bool | list | type(None)) else str(value)


def _default(field: dataclasses.Field) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default if not callable(field.default) else None
    return None


class Checkpoints:
    """One folder for each source, rewritten by each case. Tensors are saved anew only if they are others."""

    def __init__(self, root: Path, base: GPTModel):
        self.root = root
        self.base_state = {name: value for name, value in base.state_dict().items() if torch.is_tensor(value)}
        self._save_distributed(base, root / "base")

    def _save_distributed(self, model: GPTModel, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state = {"model": model.sharded_state_dict(metadata=sharding_metadata()), "iteration": 5}
        dist_checkpointing.save(state, folder, content_metadata={})

    def write(self, source: str, model: GPTModel, changes: dict[str, object]) -> Path:
        state = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
        is_base = state.keys() == self.base_state.keys() and all(
            torch.equal(value, self.base_state[name]) for name, value in state.items()
        )
        if source == "megatron":
            folder = self.root / "megatron"
            (folder / "mp_rank_00").mkdir(parents=True, exist_ok=True)
            file = {"args": to_args(changes), "checkpoint_version": 3.0, "iteration": 5, "model": state}
            torch.save(file, folder / "mp_rank_00" / "model_optim_rng.pt")
            return folder
        folder = self.root / "base"
        if not is_base:
            folder = self.root / "other"
            self._save_distributed(model, folder)
        common = {"iteration": 5, "checkpoint_version": 3.0}
        (folder / "run_config.yaml").unlink(missing_ok=True)
        if source == "mcore":
            common["args"] = to_args(changes)
        else:
            (folder / "run_config.yaml").write_text(yaml.safe_dump(to_run_config(changes)))
        torch.save(common, folder / "common.pt")
        return folder


class Conversions:
    """Logits that transformers computes from our conversion, kept by config as the weights are the same."""

    def __init__(self, root: Path):
        self.root = root
        self.logits: dict[str, torch.Tensor] = {}
        # A conversion that transformers does not load leaves its folder.
        self.number = 0

    def compute(self, reader, weights: str) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        key = json.dumps([weights, reader.model_config.to_json()], sort_keys=True)
        if key not in self.logits:
            self.number += 1
            folder = self.root / f"hf{self.number}"
            convert(reader, folder, "hf")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            with torch.no_grad():
                self.logits[key] = model.eval()(token_ids()).logits
        return self.logits[key]


def perturb(root: str, names: list[str] | None = None) -> dict:
    """Runs the cases. Returns counts by outcome, and a line for each case that was read as another model in silence."""
    # A setting may be a folder that Megatron-core writes to.
    working_folder = Path(root) / "working"
    working_folder.mkdir()
    with contextlib.chdir(working_folder):
        return _perturb(Path(root), names)


def _perturb(root: Path, names: list[str] | None) -> dict:
    multiprocessing.current_process()._config["daemon"] = False
    meshes.build_mesh(1, 1)
    tensor_parallel.get_cuda_rng_tracker = lambda *_, **__: _NoTracker()
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.cuda.current_device = lambda: torch.device("cpu")
    ones = torch.ones
    torch.ones = lambda *sizes, device=None, **options: ones(*sizes, **options)
    base = build({})
    fill(base)
    checkpoints, conversions = Checkpoints(root, base), Conversions(root)
    base_logits, base_shapes = compute_logits(base), _shapes(base)
    counts, silent, refused, not_computed = Counter(), [], Counter(), {}
    for changes in [{}, *iter_cases(names)]:
        label = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in changes.items())
        (root / "case").write_text(label)
        try:
            model = build(changes)
            fill(model)
            logits = compute_logits(model)
        except Exception as error:
            check_raised_by_library(error)
            counts["not computed"] += 1
            not_computed[label] = f"{type(error).__name__}: {error}"[:120]
            continue
        if changes.keys() & set(PRECISION):
            logits = compute_logits(_in_full_precision(model, changes))
        shapes = _shapes(model)
        moved = shapes != base_shapes or not _same(logits, base_logits)
        for source in SOURCES:
            try:
                folder = checkpoints.write(source, model, changes)
            except Exception as error:
                check_raised_by_library(error)
                counts["not saved"] += 1
                not_computed[f"{source}: {label}"] = f"{type(error).__name__}: {error}"[:120]
                continue
            is_base = shapes == base_shapes and not changes.keys() & set(PRECISION)
            weights = "base" if is_base else label
            try:
                ours = conversions.compute(formats.open(folder), weights)
            except CheckpointError:
                counts["moved, refused" if moved else "not moved, refused"] += 1
                refused[f"{label}{'' if moved else ' (not moved)'}"] += 1
                continue
            except StrictDataclassClassValidationError:
                counts["not loaded by transformers"] += 1
                continue
            if _same(ours, logits):
                counts["moved, read" if moved else "not moved, read"] += 1
            else:
                counts["SILENT"] += 1
                silent.append(f"{source}: {label}: {float((ours - logits).abs().max()):.2g}")
    scale = float(base_logits.abs().max())
    results = {"counts": dict(counts), "silent": silent, "refused": dict(refused)}
    return {**results, "not_computed": not_computed, "scale": scale}


def _in_full_precision(model: GPTModel, changes: dict[str, object]) -> GPTModel:
    """Returns a model of the same rounded weights that computes in fp32, to compare what is computed from them."""
    full = build({name: value for name, value in changes.items() if name not in PRECISION})
    state = {name: value.float() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    full.load_state_dict(state, strict=False)
    return full


def _shapes(model: GPTModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool(((ours - theirs).abs().max() < TOLERANCE).item())


class _NoTracker:
    """Stands in for the generator states of GPUs."""

    def fork(self, *_, **__):
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True
