"""What the keys of DeepSpeed's model-states files say about the model: DeepSpeed's own, and those of training scripts.

A script's client state lies beside DeepSpeed's keys in one dict. Megatron-DeepSpeed keeps its run's arguments there,
which are checked as in Megatron-LM's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.megatron_lm import argument_parsing
from megatron_ligo.checkpoint.formats.megatron_lm.arguments import as_mapping
from megatron_ligo.checkpoint.model_record import RUN_STATE
from megatron_ligo.checkpoint.source_keys import AcceptedKeys, KeyTable, describe_value
from megatron_ligo.common.errors import CheckpointError, ErrorCollector

ARGS, DS_CONFIG, ZERO = "args", "ds_config", "zero_optimization"
MAX_NESTING = 8


def _harmless(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in groups.items() for name in names.split()}


STATES = KeyTable(
    fields={
        "module": "tensors",
        "param_shapes": "tensors",
        "frozen_param_shapes": "tensors",
        "frozen_param_fragments": "tensors",
        "shared_params": "tensors",
        "global_steps": "step",
        "dp_world_size": "layout",
        "mp_world_size": "layout",
        ARGS: "the arguments of the run (argument_keys.py)",
        DS_CONFIG: "DeepSpeed's config (CONFIG)",
        RUN_STATE: "the state of this program's training",
    },
    harmless=_harmless(
        {
            "names and layout; the tensors say what is stored": """
                buffer_names checkpoint_parallel_dimensions sparse_tensor_module_names csr_tensor_module_names
                universal_checkpoint_info ds_version checkpoint_version
            """,
            "optimizer, schedule and samples": """
                optimizer lr_scheduler opt_param_scheduler data_sampler random_ltd data_loading dataloader sampler
            """,
            "counters": "skipped_steps global_samples iteration tokens step global_step epoch last_global_step loss",
            "generator states": """
                rng_state random_rng_state np_rng_state torch_rng_state cuda_rng_state rng_tracker_states
            """,
            "outputs for comparison": "checkpoint_validation_logits",
            "PyTorch Lightning's own": "pytorch-lightning_version loops callbacks lr_schedulers optimizer_states",
        }
    ),
    fixed={"num_experts": (None, [], [1])},
)

# DeepSpeed's config. Keys that switch a feature on by a table of their own are in SWITCHES.
CONFIG = KeyTable(
    fields={ZERO: "layout"},
    harmless=_harmless(
        {
            "batches, optimizer and schedule": """
                train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer
                managed_gradient_accumulation scheduler zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
                prescale_gradients gradient_predivide_factor gradient_allreduce_op sparse_gradients dataloader_drop_last
                data_efficiency curriculum_learning data_sampling progressive_layer_drop eigenvalue
            """,
            "numerics within rounding": """
                fp16 bf16 bfloat16 amp torch_autocast data_types communication_data_type fp32_allreduce
                seq_parallel_communication_data_type check_overflow
            """,
            "layout, memory and speed": """
                activation_checkpointing aio compile disable_allgather disable_python_gc pipeline checkpoint nebula
                datastates datastates_ckpt use_data_before_expert_parallelism sequence_parallel_size
                data_parallel_size hybrid_engine memory_breakdown superoffload graph_harvesting
            """,
            "logging and search": """
                autotuning comet comms_logger csv_monitor dump_state elasticity flops_profiler log_level monitor_config
                steps_per_print tensorboard timers vocabulary_size wall_clock_breakdown wandb
            """,
        }
    ),
)
# Features that change the module: each must be absent or off.
SWITCHES = {
    "compression_training": "the model was pruned or quantized in training",
    "quantize_training": "the model was quantized in training",
    "weight_quantization": "the weights are quantized",
    "sparse_attention": "attention skips blocks",
    "tensor_parallel": "AutoTP cuts Hugging Face's modules over ranks",
    "expert_parallel": "the model has experts",
}
# DeepSpeed's zero_optimization, the keys of its older versions too.
ZERO_TABLE = KeyTable(
    fields={"stage": "layout"},
    harmless=_harmless(
        {
            "buckets, communication and speed": """
                contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
                allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm ignore_unused_parameters
                memory_efficient_linear override_module_apply log_trace_cache_warnings enable_sanity_checks leaf_module
                pipeline_loading_checkpoint mics_hierarchical_params_gather
                prefetch_bucket_size stage3_prefetch_bucket_size max_live_parameters stage3_max_live_parameters
                max_reuse_distance stage3_max_reuse_distance module_granularity_threshold
                stage3_module_granularity_threshold use_all_reduce_for_fetch_params
                stage3_use_all_reduce_for_fetch_params allgather_sequential stage3_allgather_sequential
            """,
            "where numbers lie while training": """
                sub_group_size offload_param offload_optimizer cpu_offload cpu_offload_param cpu_offload_params
                cpu_offload_use_pin_memory param_persistence_threshold stage3_param_persistence_threshold
                model_persistence_threshold stage3_model_persistence_threshold save_muon_momentum_buffer_in_memory
            """,
            "order and gaps of the flat partitions, which these state themselves": """
                elastic_checkpoint round_robin_gradients parameter_alignment legacy_stage1 load_from_fp32_weights
            """,
            "files beside these": """
                gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save
                stage3_gather_fp16_weights_on_model_save
            """,
            "a second copy of the shares, not saved": "zero_hpz_partition_size",
            "quantized between ranks only; stored in full": "zero_quantized_weights zero_quantized_gradients",
        }
    ),
    fixed={
        "mics_shard_size": (-1, 0, None),
        "zero_quantized_nontrainable_weights": (False, None),
        "zenflow": (None,),
    },
    hints={
        "mics_shard_size": "Its shares are those of a group.",
        "zero_quantized_nontrainable_weights": "Parameters that are not trained are stored quantized.",
        "zenflow": "Its fp32 weights may be older than the module's: save with ZenFlow off.",
    },
)
# Values of a feature's size that leave it off, such as autotp_size = 1.
SIZES_OFF = (0, 1, None, False)


def check_state(
    state: Mapping[str, object], where: str, model_config: ModelConfig, beside: str, accepted: AcceptedKeys
) -> None:
    """Raises CheckpointError if a model-states file describes another model than a config.

    where: the file; beside: what states the config.
    """
    errors = ErrorCollector(f"{where}: the model is one that this program does not compute", CheckpointError)
    STATES.check({str(name): value for name, value in state.items()}, accepted, errors)
    config = state.get(DS_CONFIG)
    if isinstance(config, Mapping):
        _check_config({str(name): value for name, value in config.items()}, accepted, errors)
    errors.raise_if_any()
    values = as_mapping(state.get(ARGS), f"{ARGS} in {where}")
    if values is not None:
        arguments = argument_parsing.RunArguments(values, f"{ARGS} in {where}")
        argument_parsing.check_arguments(arguments, model_config, beside, accepted)


def _check_config(config: Mapping[str, object], accepted: AcceptedKeys, errors: ErrorCollector) -> None:
    CONFIG.check({name: value for name, value in config.items() if name not in SWITCHES}, accepted, errors)
    for name, reason in SWITCHES.items():
        if _is_on(config.get(name)):
            errors.add(f"{DS_CONFIG}: {name}", "off", describe_value(config[name]), f"With it, {reason}.")
    zero = config.get(ZERO)
    if isinstance(zero, Mapping):
        ZERO_TABLE.check({str(name): value for name, value in zero.items()}, accepted, errors)


def _is_on(feature: object) -> bool:
    """Returns whether a feature's table switches anything on: a switch, or without switches any size above one."""
    if not isinstance(feature, Mapping):
        return bool(feature)
    switches = list(_iter_values(feature, "enabled"))
    if switches:
        return any(value not in (False, None) for value in switches)
    return any(value not in SIZES_OFF for value in feature.values())


def _iter_values(table: Mapping, wanted: str, depth: int = 0) -> Iterator[object]:
    for name, value in table.items():
        if name == wanted:
            yield value
        elif isinstance(value, Mapping) and depth < MAX_NESTING:
            yield from _iter_values(value, wanted, depth + 1)
