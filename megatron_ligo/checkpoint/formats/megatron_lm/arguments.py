"""Converts between a model's config and the run arguments that Megatron-LM saves in its checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_ligo import arch as architectures
from megatron_ligo.arch.mcore_layer_patterns import to_layer_patterns
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.formats.megatron_lm import argument_parsing, expert_arguments, rope_arguments, run_config
from megatron_ligo.checkpoint.formats.megatron_lm.argument_parsing import RunArguments
from megatron_ligo.checkpoint.io import iteration_folders
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, Problem

# Megatron-LM's default of --make-vocab-size-divisible-by. It pads the vocabulary to a multiple of this times tp.
VOCAB_DIVISOR = 128
CHECKPOINT_VERSION = 3.0


class ArgumentStub:
    """Stands in for the pickled objects of a Megatron-LM checkpoint: keeps the state and executes nothing."""

    _arguments: tuple[object, ...] = ()

    def __init__(self, *arguments: object, **__: object):
        if arguments:
            self._arguments = arguments

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._arguments!r}"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


_STUB_NAMES = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "signal.Signals",
    "_io.BytesIO", "builtins.bytes",
    "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar",
    "megatron.core.enums.ModelType", "megatron.model.enums.ModelType", "megatron.legacy.model.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend", "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope", "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
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
    folder: Path, args: object, accepted: AcceptedKeys, vocab_rows: int | None = None
) -> tuple[ModelConfig, Mapping[str, object], tuple[Path, ...]]:
    """Returns the config, the carried Hugging Face config keys and the carried files of an iteration's folder.

    The config is read from a record in the folder, or next to the tracker one level up; else from the arguments of the
    run: `args`, as saved with the weights, or Megatron-Bridge's run_config.yaml, or NeMo's model.yaml, which may leave
    the vocabulary to its tokenizer: the embedding's `vocab_rows` are read then. Raises CheckpointError if none of them
    describes a model, or if two describe different ones.
    """
    roots = [folder]
    if (folder.parent / iteration_folders.TRACKER).is_file():
        roots.append(folder.parent)
    if folder.name == run_config.NEMO_WEIGHTS:
        roots.append(folder.parent)
    folders = [*roots, *run_config.find_nemo_tokenizers(folder)]
    files = tuple(file for root in folders for file in model_record.find_carried_files(root))
    sources = _find_arguments(folder, args, vocab_rows)
    record_root = next((root for root in roots if model_record.has_record(root)), None)
    if record_root is None and sources:
        first, *sources = sources
        model_config, carried = argument_parsing.parse_model_config(first, accepted), {}
        beside = first.where
    else:
        model_config, carried = model_record.read(record_root or folder, accepted)
        beside = f"the config in {record_root}"
    for source in sources:
        argument_parsing.check_arguments(source, model_config, beside, accepted)
    return model_config, carried, files


def _find_arguments(folder: Path, args: object, vocab_rows: int | None) -> list[RunArguments]:
    """Returns the arguments of the run that saved a folder, by source. Raises CheckpointError for unreadable ones."""
    values = as_mapping(args, f"args in {folder}")
    sources = [] if values is None else [RunArguments(values, f"args in {folder}")]
    bridge = run_config.find_arguments(folder, vocab_rows)
    return sources if bridge is None else [*sources, bridge]


def as_mapping(args: object, where: str) -> Mapping[str, object] | None:
    """Returns a Namespace's stand-in, or a dict, as a mapping by name; None if there is nothing in it."""
    values = vars(args) if isinstance(args, ArgumentStub) else {} if args is None else args
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(Problem(where, "a Namespace or a dict of arguments", type(args).__name__))
    return values or None


def to_megatron_args(
    model_config: ModelConfig, tp: int, pp: int, padded_vocab_size: int, dtype: torch.dtype, step: int, ep: int = 1
) -> Namespace:
    """Returns the arguments that Megatron-LM compares with a run's own, or adopts under --use-checkpoint-args.

    Raises CheckpointError for rotary positions that they cannot state.
    """
    rope_arguments.check_sayable(model_config)
    common = _common_args(model_config, tp, pp, padded_vocab_size, dtype, step)
    if not rope_arguments.has_llama_layers(model_config):
        return Namespace(**common)
    return Namespace(
        **common,
        **LLAMA_ARGS,
        add_bias_linear=architectures.get(model_config.arch).has_linear_biases(model_config),
        qk_layernorm=architectures.get(model_config.arch).normalises_each_head,
        **expert_arguments.to_expert_args(model_config, ep),
        **rope_arguments.to_rope_args(model_config),
    )


LLAMA_ARGS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    # Megatron-Bridge takes these to be 0.1 where they are not stated.
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # Stated for Megatron-Bridge, which has no defaults for them: none changes what the model computes.
    "no_persist_layer_norm": False,
    "overlap_p2p_comm": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "fp8_param_gather": False,
    "bias_swiglu_fusion": True,
    "bias_gelu_fusion": False,
    "squared_relu": False,
    "init_method_xavier_uniform": False,
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "is_hybrid_model": False,
    "heterogeneous_layers_config_path": None,
    "fp16_lm_cross_entropy": False,
    "transformer_impl": "transformer_engine",
    "qk_l2_norm": False,
    "init_model_with_meta_device": False,
}


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
        **to_layer_patterns(model_config),
        "iteration": step,
        "world_size": tp * pp,
        "data_parallel_size": 1,
        "use_distributed_optimizer": False,
    }
