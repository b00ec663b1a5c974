"""The settings of a GPT-NeoX run, which lie as YAML beside its checkpoint, and the Hugging Face config that they mean.

GPT-NeoX reads `num-layers` and `num_layers` alike, from any number of files that state each setting once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.io import plain_yaml
from megatron_ligo.checkpoint.source_keys import AcceptedKeys, KeyTable, check_agreement, describe_value
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

# The folder of the run's files, which GPT-NeoX copies into each checkpoint.
FOLDER = "configs"
SUFFIXES = (".yml", ".yaml", ".json")
ATTENTION = ("global", "flash")
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "pos_emb")
# GPT-NeoX's own defaults of the settings that are read.
DEFAULTS: Mapping[str, object] = {
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "no_weight_tying": False,
    "gpt_j_residual": False,
    "layernorm_epsilon": 1e-5,
    "activation": "gelu",
    "bias_gelu_fusion": False,
}
# GPT-NeoX's fused kernel approximates GELU with tanh.
FUSED_GELU = "gelu_new"


def _harmless(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in groups.items() for name in names.split()}


TABLE = KeyTable(
    fields={
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_heads",
        "num_kv_heads": "as many as num_attention_heads",
        "max_position_embeddings": "max_positions",
        "rotary_pct": "rotary_fraction",
        "rotary_emb_base": "rope_base",
        "no_weight_tying": "tied",
        "gpt_j_residual": "parallel_residual",
        "layernorm_epsilon": "norm_eps",
        "activation": "activation",
        "bias_gelu_fusion": "activation",
        "attention_config": "the attention of each layer: all of them global",
        "moe_num_experts": "none",
    },
    fixed={
        "pos_emb": ("rotary",),
        "norm": ("layernorm",),
        "gpt_j_tied": (False,),
        "use_qk_layernorm": (False,),
        "sliding_window_width": (None,),
        "soft_prompt_tuning": (None,),
        "num_unique_layers": (None,),
        "use_bias_in_norms": (True,),
        "use_bias_in_attn_linear": (True,),
        "use_bias_in_mlp": (True,),
        "use_mup": (False,),
        "te_layernorm_mlp": (False,),
        "te_mha": (False,),
        "model_arch": ("gpt2",),
    },
    harmless=_harmless(
        {
            "the tensors say it": """
                intermediate_size feedforward_size expansion_factor mlp_multiple_of make_vocab_size_divisible_by
                padded_vocab_size extra_sentinel_tokens output_layer_parallelism model_parallel_size te_columnparallel
                te_rowparallel
            """,
            "only other positions, norms, attentions or experts read it": """
                rpe_num_buckets rpe_max_distance opt_pos_emb_offset rms_norm_epsilon scalenorm_epsilon rmsnorm_fusion
                sparsity_config sparse_attention param_sharing_style gmlp_attn_dim mamba_selective_scan_fusion
                mamba_causal_conv_fusion mamba_inner_func_fusion mamba_selective_fp32_params mamba_use_bias_in_conv
                mamba_use_bias_in_linears dim_att head_size ffn_dim use_flashattn_swiglu mup_init_scale mup_attn_temp
                mup_output_temp mup_embedding_mult mup_rp_embedding_mult mup_width_scale coord_check save_base_shapes
                base_shapes_file moe_expert_interval moe_top_k moe_router_type moe_lbl_in_fp32 moe_jitter_eps
            """,
            "the same function by another kernel, or numerics within rounding": """
                precision layernorm_fusion scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion
                bias_dropout_fusion rope_fusion rotary_save_freqs_buffer fused_kernels_build_path
                fp16_lm_cross_entropy apply_query_key_layer_scaling attention_softmax_in_fp32 onnx_safe te_fp8_format
                te_fp8_wgrad te_fp8_amax_history_len te_fp8_amax_compute_algo te_fp8_margin te_fp8_mha fp16 bf16 amp
                fp32_allreduce communication_data_type data_types
            """,
            "how weights begin": "init_method init_method_std output_layer_init_method use_cpu_initialization",
            "dropout acts in training only": "hidden_dropout attention_dropout",
            "layout, memory and speed": """
                pipe_parallel_size pipe_partition_method world_size is_pipe_parallel sequence_parallel
                checkpoint_activations checkpoint_num_layers deepspeed_activation_checkpointing
                contiguous_checkpointing checkpoint_in_cpu synchronize_each_layer profile_backward
                partition_activations activation_checkpointing zero_optimization zero_stage zero_reduce_scatter
                zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size prescale_gradients
                gradient_predivide_factor sparse_gradients elasticity lazy_mpu_init autotuning autotuning_run
            """,
            "optimizer and schedule": """
                optimizer optimizer_type use_bnb_optimizer scheduler lr lr_decay_style lr_decay_iters
                lr_decay_fraction min_lr warmup override_lr_scheduler use_checkpoint_lr_scheduler weight_decay
                gradient_clipping clip_grad hysteresis dynamic_loss_scale loss_scale loss_scale_window min_scale
                deepscale deepscale_config
            """,
            "batches, data and the loss": """
                seq_length train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps batch_size
                train_iters train_epochs eval_iters eval_interval split vocab_file merge_file tokenizer_type data_path
                use_shared_fs train_data_paths train_label_data_paths train_reward_data_paths test_data_paths
                test_label_data_paths test_reward_data_paths valid_data_paths valid_label_data_paths
                valid_reward_data_paths pos_train_data_paths neg_train_data_paths pos_train_label_data_paths
                neg_train_label_data_paths pos_valid_data_paths neg_valid_data_paths pos_valid_label_data_paths
                neg_valid_label_data_paths pos_test_data_paths neg_test_data_paths pos_test_label_data_paths
                neg_test_label_data_paths train_data_weights valid_data_weights test_data_weights
                weight_by_num_documents weighted_sampler_alpha data_impl pack_impl dataset_impl train_impl dpo_fp32
                dpo_reference_free dpo_beta kto_fp32 kto_desirable_weight kto_undesirable_weight kto_beta z_loss
                fp32_reinforce kl_impl kl_div_beta reinforce_leave_one_out allow_chopped mmap_warmup num_workers
                eod_mask_loss short_seq_prob loss_on_targets_only masked_lm_prob mean_noise_span_length packing
                curriculum_learning curriculum_seqlen data_efficiency char_level_ppl seed
            """,
            "files and logging": """
                save load s3_path s3_chunk_size config_files checkpoint checkpoint_validation_with_forward_pass
                checkpoint_scale checkpoint_factor save_interval extra_save_iters no_save_optim no_save_rng
                no_load_optim no_load_rng finetune keep_last_n_checkpoints exit_interval use_wandb wandb_group
                wandb_run_name wandb_team wandb_project wandb_host wandb_init_all_ranks wandb git_hash log_dir
                tensorboard tensorboard_dir csv_monitor comms_logger use_comet comet_workspace comet_project
                comet_experiment_name comet_tags comet_others comet_experiment peak_theoretical_tflops log_interval
                log_grad_pct_zeros log_param_norm log_grad_norm log_optimizer_states log_gradient_noise_scale
                gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload memory_profiling
                memory_profiling_path profile profile_step_start profile_step_stop steps_per_print
                wall_clock_breakdown dump_state flops_profiler serve_model_weights weight_server_port
                online_dataserver_ips online_dataserver_ports
            """,
            "how a run is started": """
                distributed_backend local_rank rank adlr_autoresume adlr_autoresume_interval deepspeed deepspeed_mpi
                deepspeed_slurm deepspeed_extra_args user_script iteration do_train do_valid do_test global_num_gpus
                hostfile include exclude num_nodes num_gpus master_port master_addr launcher force_multi no_ssh_check
                comment account
            """,
            "text generation and evaluation": """
                text_gen_type precompute_model_name temperature top_p top_k return_logits maximum_tokens prompt_end
                sample_input_file sample_output_file num_samples recompute eval_results_prefix eval_tasks
            """,
        }
    ),
)


@dataclass(frozen=True)
class NeoxSettings:
    """The settings of a run by their names with underscores. where: what holds them, for errors."""

    values: Mapping[str, object]
    where: str

    def to_hf_config(self, vocab_size: int, ffn_size: int, accepted: AcceptedKeys) -> dict[str, object]:
        """Returns the config.json of the same model. vocab_size, ffn_size: as the tensors have them.

        Raises CheckpointError for settings of a network that is not GPT-NeoX's in Hugging Face's form.
        """
        errors = ErrorCollector(f"{self.where}: the model is one that this program does not compute", CheckpointError)
        TABLE.check(self.values, accepted, errors)
        for name in REQUIRED:
            if self.values.get(name) is None:
                errors.add(name, "a value", "none", "Put the model's Hugging Face config.json beside the weights.")
        values = {**DEFAULTS, **self.values}
        heads = values.get("num_attention_heads")
        if values.get("num_kv_heads") not in (None, heads):
            errors.add("num_kv_heads", f"{heads}, as num_attention_heads", values["num_kv_heads"])
        if values.get("moe_num_experts") not in (None, 0, 1):
            errors.add("moe_num_experts", "none, or 1", values["moe_num_experts"])
        kinds = set(_iter_words(values.get("attention_config")))
        if kinds - set(ATTENTION):
            errors.add("attention_config", " or ".join(ATTENTION), describe_value(values["attention_config"]))
        errors.raise_if_any()
        is_fused = values["activation"] == "gelu" and values["bias_gelu_fusion"]
        return {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": values["hidden_size"],
            "intermediate_size": ffn_size,
            "num_hidden_layers": values["num_layers"],
            "num_attention_heads": heads,
            "max_position_embeddings": values["max_position_embeddings"],
            "rotary_pct": values["rotary_pct"],
            "rotary_emb_base": values["rotary_emb_base"],
            "layer_norm_eps": values["layernorm_epsilon"],
            "hidden_act": FUSED_GELU if is_fused else values["activation"],
            "use_parallel_residual": values["gpt_j_residual"],
            "tie_word_embeddings": not values["no_weight_tying"],
            "attention_bias": True,
        }


def _iter_words(value: object) -> Iterator[object]:
    """Yields the words in nested lists, and whatever else is there but numbers."""
    if isinstance(value, list):
        for item in value:
            yield from _iter_words(item)
    elif value is not None and type(value) is not int:
        yield value


def find_files(folder: Path) -> list[Path]:
    """Returns the settings' files of a checkpoint's folder, or of the folder of checkpoints that it lies in."""
    for root in (folder / FOLDER, folder.parent / FOLDER, folder):
        files = sorted(path for path in root.glob("*") if path.suffix in SUFFIXES[:2] and path.is_file())
        if files and root.name == FOLDER:
            files += sorted(path for path in root.glob(f"*{SUFFIXES[2]}") if path.is_file())
        if files:
            return files
    return []


def read_settings(folder: Path) -> NeoxSettings | None:
    """Returns the settings of a checkpoint's folder; None if it has none.

    Raises CheckpointError for a damaged file, and for a setting that two files state differently.
    """
    files = find_files(folder)
    values: dict[str, object] = {}
    for path in files:
        content = plain_yaml.load(path)
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise CheckpointError(Problem(f"{path}", "settings by name", type(content).__name__))
        for name, value in content.items():
            name = name.replace("-", "_")
            if values.setdefault(name, value) != value:
                expected = f"{describe_value(values[name])}, as stated before"
                raise CheckpointError(Problem(f"{path}: {name}", expected, describe_value(value)))
    return NeoxSettings(values, ", ".join(str(path) for path in files)) if files else None


def check_config(run: ModelConfig, config: ModelConfig, where: str, beside: str, errors: ErrorCollector) -> None:
    """Adds an error for each size that a run's settings and a config state differently.

    The vocabulary may be padded, and configs of the hub name the exact GELU where the run had the fused one.
    """
    sizes = run.to_json()
    del sizes["vocab_size"]
    if (run.activation, config.activation) == (FUSED_GELU, "gelu"):
        del sizes["activation"]
    check_agreement(sizes, config.to_json(), where, beside, errors)
