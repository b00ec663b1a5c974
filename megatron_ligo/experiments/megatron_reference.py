"""Logits of a Megatron checkpoint by a GPTModel of Megatron-core, built from the checkpoint's own run arguments.

The network is built as Megatron-LM's model builder does, in fp32 on the CPU, in a process of its own. The weights are
those that the Reader gives; how they compute is stated by the arguments alone.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common import library_log
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.sharding.fused_tensors import stored_tensors

NUMBERS = (bool, int, float, type(None))
# The fields that choose a computation by name. No other text of a checkpoint's args reaches Megatron-core: as
# config_logger_dir, a text is a folder that it writes to.
CHOICES = ("normalization", "softmax_type", "experimental_attention_variant", "transformer_impl")
# Fields of TransformerConfig that lay out or speed up a run and do not change what it computes.
RUN_FIELDS = (
    "parallel", "pipeline", "recompute", "offload", "fusion", "fp8", "fp4", "fp16", "bf16", "graph", "overlap",
    "dtype", "dropout", "comm", "init", "backend", "deterministic", "distribute", "memory", "timers", "finalize",
    "gradient", "grad", "micro", "inference", "deallocate", "persist", "heterogeneous", "expert", "moe", "mtp",
)  # fmt: skip
# Megatron-LM's arguments under other names than TransformerConfig's fields.
RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
YARN = {
    "yarn_rotary_scaling_factor": ("rotary_scaling_factor", 1.0),
    "yarn_mscale": ("mscale", 1.0),
    "yarn_mscale_all_dim": ("mscale_all_dim", 0.0),
    "yarn_original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "yarn_beta_fast": ("yarn_beta_fast", 32.0),
    "yarn_beta_slow": ("yarn_beta_slow", 1.0),
    "yarn_correction_range_round_to_int": ("yarn_correction_range_round_to_int", True),
}


def compute_megatron_logits(reader: Reader, args: Mapping[str, object], inputs: Tensor) -> Tensor:
    """Returns the logits (batch, length, vocab) of token ids (batch, length), fp32.

    args: the run arguments. Raises whatever Megatron-core raises if it does not build or load the model.
    """
    request = (str(reader.path), reader.format, tuple(reader.accepted), dict(args), inputs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=library_log.install) as pool:
        return pool.submit(_compute, *request).result()


def _compute(path: str, format_name: str, accepted: tuple, args: dict[str, object], inputs: Tensor) -> Tensor:
    # Imported late: needs DeepSpeed and Megatron-core.
    from megatron_ligo.distributed import mesh as meshes

    torch.set_num_threads(1)
    reader = formats.open(path, format_name, accepted)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes.build_mesh(1, 1)
    _run_on_cpu()
    model = _build_model(args, reader.model_config.vocab_size)
    stored = stored_tensors(reader.arch, reader.model_config, "mcore").items()
    state = {
        name: item.assemble([reader.read(key).float() for key in item.keys], reader.model_config)
        for name, item in stored
    }
    report = model.load_state_dict(state, strict=False)
    lost = [name for name in (*report.missing_keys, *report.unexpected_keys) if "_extra_state" not in name]
    if lost:
        raise CheckpointError(Problem(path, "the tensors of the arguments' model", f"others: {lost[:3]}"))
    length = inputs.shape[1]
    hidden = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    with torch.no_grad():
        return model.eval()(inputs, torch.arange(length).expand_as(inputs), hidden)


def _run_on_cpu() -> None:
    """Lets Megatron-core's attention and embeddings run without a GPU; without dropout they draw no numbers there."""
    from megatron.core import tensor_parallel

    class NoTracker:
        @contextmanager
        def fork(self, *_: object, **__: object):
            yield

        def is_initialized(self) -> bool:
            return True

    tensor_parallel.get_cuda_rng_tracker = lambda *_, **__: NoTracker()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor


def _build_model(args: Mapping[str, object], vocab_size: int) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = _build_config(args)
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=args["max_position_embeddings"],
        parallel_output=False,
        share_embeddings_and_output_weights=not args.get("untie_embeddings_and_output_weights", False),
        position_embedding_type=args.get("position_embedding_type", "learned_absolute"),
        rotary_percent=args.get("rotary_percent", 1.0),
        rotary_base=args.get("rotary_base", 10000),
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=args.get("rotary_seq_len_interpolation_factor"),
    )


def _build_config(args: Mapping[str, object]):
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn import functional

    from megatron_ligo.models.mcore.layer_spec import UNFUSED

    settings = {}
    for field in fields(TransformerConfig):
        runs = any(word in field.name for word in RUN_FIELDS)
        if field.init and field.name in args and not runs and _is_setting(field.name, args[field.name]):
            settings[field.name] = args[field.name]
    settings |= {name: args[key] for key, name in RENAMED.items() if key in args}
    if not args.get("group_query_attention", True):
        settings["num_query_groups"] = None
    if args.get("swiglu"):
        settings |= {"gated_linear_unit": True, "activation_func": functional.silu}
    elif args.get("squared_relu"):
        settings["activation_func"] = lambda values: functional.relu(values).square()
    config = TransformerConfig(
        **settings,
        **UNFUSED,
        use_cpu_initialization=True,
    )
    if args.get("position_embedding_type") == "yarn":
        for name, (key, default) in YARN.items():
            setattr(config, name, args.get(key, default))
    return config


def _is_setting(name: str, value: object) -> bool:
    """Returns whether a value is a number, numbers in a list, or the name of a choice."""
    if isinstance(value, list | tuple):
        return all(isinstance(item, NUMBERS) for item in value)
    return isinstance(value, str) if name in CHOICES else isinstance(value, NUMBERS)
