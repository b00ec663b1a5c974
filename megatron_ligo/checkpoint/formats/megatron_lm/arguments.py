"""Converts between a model's config and the run arguments that Megatron-LM saves in its checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.formats.megatron_lm import rope_arguments
from megatron_ligo.checkpoint.io import iteration_folders
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem

# Megatron-LM's default of --make-vocab-size-divisible-by. It pads the vocabulary to a multiple of this times tp.
VOCAB_DIVISOR = 128
CHECKPOINT_VERSION = 3.0


class ArgumentStub:
    """Stands in for the pickled objects of a Megatron-LM checkpoint: keeps the state and executes nothing."""

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


_STUB_NAMES = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "signal.Signals",
    "_io.BytesIO", "builtins.bytes",
    "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar",
    "megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic", "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
)  # fmt: skip
# One class per name, as torch keys its allowed globals by class.
STAND_INS = tuple((type(name.rpartition(".")[2], (ArgumentStub,), {}), name) for name in _STUB_NAMES)


def plain_arguments(args: object) -> Mapping[str, object] | None:
    """Returns the run arguments by name; None if a checkpoint has none."""
    return dict(vars(args)) if isinstance(args, ArgumentStub) else None


def read_model_config(
    folder: Path, args: object, accepted: AcceptedKeys
) -> tuple[ModelConfig, Mapping[str, object], tuple[Path, ...]]:
    """Returns the config, the carried Hugging Face config keys and the carried files of an iteration's folder.

    The config is read from a record in the folder, or next to the tracker one level up; else from `args`, the saved
    run arguments. Raises CheckpointError if none of them describes a model.
    """
    roots = [folder]
    if (folder.parent / iteration_folders.TRACKER).is_file():
        roots.append(folder.parent)
    files = tuple(file for root in roots for file in model_record.find_carried_files(root))
    for root in roots:
        record = model_record.find_record(root, accepted)
        if record:
            return (*record, files)
    if not isinstance(args, ArgumentStub):
        model_record.read(folder, accepted)
    return parse_model_config(vars(args), f"args in {folder}", accepted), {}, files


def parse_model_config(args: Mapping[str, object], where: str, accepted: AcceptedKeys = NO_KEYS) -> ModelConfig:
    """Returns the config that Megatron-LM's arguments describe. Raises CheckpointError unless it is a Llama's."""
    title = f"{where} do not describe a Llama: put the model's Hugging Face config.json next to the weights"
    errors = ErrorCollector(title, CheckpointError)
    for name, value in _FIXED_ARGS.items():
        if args.get(name, value) != value:
            errors.add(name, value, repr(args[name]))
    missing = [name for name in _REQUIRED_ARGS if args.get(name) is None]
    for name in missing:
        errors.add(name, "a value", "none")
    rope_arguments.check_rope_args(args, errors)
    errors.raise_if_any()
    has_query_groups = bool(args.get("group_query_attention"))
    window = args.get("window_size")
    has_qkv_bias = bool(args.get("add_qkv_bias"))
    padded_vocab_size = args["padded_vocab_size"]
    vocab_size = args.get("vocab_size")
    has_vocab_size = isinstance(vocab_size, int) and vocab_size > 0
    try:
        return ModelConfig(
            arch="llama",
            model_type="qwen2" if has_qkv_bias else "mistral" if window else "llama",
            num_layers=args["num_layers"],
            hidden_size=args["hidden_size"],
            ffn_size=args["ffn_hidden_size"],
            num_heads=args["num_attention_heads"],
            num_kv_heads=args["num_query_groups"] if has_query_groups else args["num_attention_heads"],
            head_dim=args.get("kv_channels") or args["hidden_size"] // args["num_attention_heads"],
            vocab_size=vocab_size if has_vocab_size and vocab_size <= padded_vocab_size else padded_vocab_size,
            max_positions=args["max_position_embeddings"],
            norm_eps=args["norm_epsilon"],
            tied=not args["untie_embeddings_and_output_weights"],
            qkv_bias=has_qkv_bias,
            **rope_arguments.parse_rope_args(args),
            sliding_window=window[0] + 1 if window else None,
        )
    except (TypeError, ValueError, LookupError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(Problem(where, "a valid model config", f"{error}")) from None


def to_megatron_args(
    model_config: ModelConfig, tp: int, pp: int, padded_vocab_size: int, dtype: torch.dtype, step: int
) -> Namespace:
    """Returns the arguments that Megatron-LM compares with a run's own, or adopts under --use-checkpoint-args.

    Raises CheckpointError for rotary positions that they cannot state.
    """
    rope_arguments.check_sayable(model_config)
    common = _common_args(model_config, tp, pp, padded_vocab_size, dtype, step)
    if model_config.arch != "llama":
        return Namespace(**common)
    return Namespace(
        **common,
        **_FIXED_ARGS,
        **rope_arguments.to_rope_args(model_config),
        window_size=None if model_config.sliding_window is None else (model_config.sliding_window - 1, 0),
    )


_FIXED_ARGS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    **rope_arguments.FIXED_ARGS,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_layernorm": False,
    "num_experts": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
}
_REQUIRED_ARGS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "padded_vocab_size",
    "max_position_embeddings", "norm_epsilon", "untie_embeddings_and_output_weights", "rotary_base",
    "normalization", "swiglu", "add_bias_linear",
)  # fmt: skip


def _common_args(
    model_config: ModelConfig, tp: int, pp: int, padded_vocab_size: int, dtype: torch.dtype, step: int
) -> dict[str, object]:
    """Returns the arguments that every architecture has."""
    return {
        "num_layers": model_config.num_layers,
        "hidden_size": model_config.hidden_size,
        "ffn_hidden_size": model_config.ffn_size,
        "num_attention_heads": model_config.num_heads,
        "group_query_attention": model_config.num_kv_heads != model_config.num_heads,
        "num_query_groups": model_config.num_kv_heads,
        "kv_channels": model_config.head_dim,
        "vocab_size": model_config.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": max(padded_vocab_size // tp, 1),
        "max_position_embeddings": model_config.max_positions,
        "seq_length": model_config.max_positions,
        "norm_epsilon": model_config.norm_eps,
        "untie_embeddings_and_output_weights": not model_config.tied,
        "add_qkv_bias": model_config.qkv_bias,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "iteration": step,
        "world_size": tp * pp,
        "data_parallel_size": 1,
        "use_distributed_optimizer": False,
    }
