"""What Megatron-LM's run arguments say about experts, and those of a model that has experts.

In a model without experts they say nothing, and harmless_arguments.py lists them.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.source_keys import AcceptedKeys, KeyTable, is_same_value
from megatron_ligo.common.errors import ErrorCollector

OFF = (False, None)
NONE = (None,)
NAMES = ("num_experts", "num_moe_experts")
# Megatron-DeepSpeed lists the experts of each group of layers, and saves those of a dense model so.
DENSE = (None, [1])
SHARED_SIZE, SHARED_GATE = "moe_shared_expert_intermediate_size", "moe_shared_expert_gate"
LAYER_FREQUENCY, BALANCING = "moe_layer_freq", "moe_router_load_balancing_type"
# Losses that act in training only. Sinkhorn's rule chooses the experts.
LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", None)
HARMLESS = """
    create_moe_param_group dense_grouped_gemm enable_expert_tensor_parallelism expert_gtp_weight_remat_size
    expert_interval expert_model_parallel_size expert_tensor_parallel_num_weight_shards
    expert_tensor_parallel_size inference_moe_disable_fused_quant_kernels
    inference_moe_token_dispatcher_type moe_aux_loss_coeff moe_combine_bwd_dtype moe_deepep_num_sms
    moe_dispatch_fwd_dtype moe_enable_deepep moe_enable_routing_replay moe_eval_capacity_factor
    moe_expert_parallel_size moe_extended_tp moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms
    moe_grad_scale_func moe_grouped_gemm moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
    moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs
    moe_layer_recompute moe_loss_coeff moe_min_capacity moe_ncclep_static_shape moe_ncclep_zero_copy
    moe_pad_experts_for_cuda_graph_inference moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
    moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_per_layer_logging
    moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_bias_update_rate moe_router_dtype
    moe_router_fusion moe_router_padding_for_fp8 moe_router_padding_for_quantization
    moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits moe_routing_trace_dump_weights
    moe_routing_trace_max_training_iters moe_routing_trace_path moe_shared_expert_overlap
    moe_single_grouped_bias moe_single_grouped_weight moe_token_dispatcher_type moe_token_drop_policy
    moe_train_capacity_factor moe_upcycling_granularity moe_use_grouped_tensor moe_use_legacy_grouped_gemm
    moe_use_upcycling moe_z_loss_coeff overlap_dispatch_backward_with_experts_wgrad
    overlap_moe_expert_parallel_comm rl_inference_expert_model_parallel_size
    rl_inference_expert_tensor_model_parallel_size topk use_grouped_gemm_for_shared_expert
"""

TABLE = KeyTable(
    fields={
        "moe_ffn_hidden_size": "ffn_size",
        "moe_router_topk": "top_k",
        "moe_router_pre_softmax": "renormalises_routing",
        SHARED_SIZE: "shared_expert_ffn_size",
        SHARED_GATE: "the shared expert's sigmoid",
        LAYER_FREQUENCY: "experts in every layer",
        BALANCING: "losses of the router",
    },
    harmless=dict.fromkeys(HARMLESS.split(), "layout, speed, precision or the training loss of the experts"),
    fixed={
        "moe_router_score_function": ("softmax", None),
        "moe_router_topk_scaling_factor": (None, 1.0),
        "moe_router_num_groups": NONE,
        "moe_router_group_topk": NONE,
        "moe_router_topk_limited_devices": NONE,
        "moe_router_enable_expert_bias": OFF,
        "moe_router_force_load_balancing": OFF,
        "moe_router_force_biased": (*OFF, 0),
        "moe_router_quantile_balancing_ema": (*OFF, 0),
        "moe_expert_capacity_factor": NONE,
        "moe_expert_rank_capacity_factor": NONE,
        "moe_pad_expert_input_to_capacity": OFF,
        "moe_token_dropping": OFF,
        "moe_top2_2nd_expert_sampling": OFF,
        "moe_apply_probs_on_input": OFF,
        "moe_input_jitter_eps": (None, 0),
        "moe_latent_size": NONE,
        "moe_mlp_glu_interleave_size": NONE,
        "moe_shared_expert_glu_interleave_size": NONE,
        "use_tutel": OFF,
    },
)


def parse_experts(values: Mapping[str, object], errors: ErrorCollector) -> dict[str, object]:
    """Returns the fields of ModelConfig that the arguments state of the experts; num_experts = 0 for a dense model."""
    stated = {name: values[name] for name in NAMES if name in values}
    counts = {name: value for name, value in stated.items() if not any(is_same_value(value, none) for none in DENSE)}
    if not counts:
        return {"num_experts": 0} if stated else {}
    (first, count), *others = counts.items()
    for name, other in others:
        if not is_same_value(other, count):
            errors.add(name, f"{count!r}, as {first} says", repr(other))
    if type(count) is not int or count < 1:
        errors.add(first, "one number of experts for all layers, at least 1", repr(count))
        return {}
    sizes = {"num_experts": count, "renormalises_routing": not values.get("moe_router_pre_softmax")}
    sizes["shared_expert_ffn_size"] = values.get(SHARED_SIZE) or 0
    if bool(values.get(SHARED_SIZE)) != bool(values.get(SHARED_GATE)):
        expected = "True with a shared expert, which no family has without its sigmoid, else False"
        errors.add(SHARED_GATE, expected, repr(values.get(SHARED_GATE)))
    for name, field in {"moe_ffn_hidden_size": "ffn_size", "moe_router_topk": "top_k"}.items():
        if values.get(name) is not None:
            sizes[field] = values[name]
    return sizes


def check_experts(values: Mapping[str, object], accepted: AcceptedKeys, errors: ErrorCollector) -> None:
    """Adds an error for each argument under which Megatron's experts compute something else. values: with experts."""
    known = {name: value for name, value in values.items() if name in TABLE}
    TABLE.check(known, accepted, errors)
    frequency = known.get(LAYER_FREQUENCY)
    in_all = [1] * len(frequency) if isinstance(frequency, list | tuple) else 1
    if frequency is not None and not is_same_value(frequency, in_all):
        errors.add(LAYER_FREQUENCY, "experts in every layer", repr(frequency)[:60])
    losses = known.get(BALANCING)
    losses = losses if isinstance(losses, list | tuple) else [losses]
    if not all(loss in LOSSES for loss in losses):
        errors.add(BALANCING, "losses that leave the choice of experts alone", repr(losses)[:60])


def to_expert_args(model_config: ModelConfig, ep: int) -> dict[str, object]:
    """Returns the arguments of a model's experts; for a dense one, that it has none. ep: expert-parallel ranks."""
    if not model_config.num_experts:
        return {"num_experts": None, "moe_grouped_gemm": False}
    return {
        "num_experts": model_config.num_experts,
        "moe_ffn_hidden_size": model_config.ffn_size,
        "moe_router_topk": model_config.top_k,
        "moe_router_pre_softmax": not model_config.renormalises_routing,
        LAYER_FREQUENCY: 1,
        BALANCING: "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        SHARED_SIZE: model_config.shared_expert_ffn_size or None,
        SHARED_GATE: model_config.shared_expert_ffn_size > 0,
        "expert_model_parallel_size": ep,
    }


def find_family(values: Mapping[str, object]) -> str:
    """Returns the name of the family whose layers the arguments describe: Llama's, or with head norms or experts."""
    sizes = parse_experts(values, ErrorCollector(""))
    if sizes.get("shared_expert_ffn_size"):
        return "qwen2_moe"
    has_experts = bool(sizes.get("num_experts"))
    has_head_norms = bool(values.get("qk_layernorm"))
    name = {(False, False): "llama", (False, True): "mixtral", (True, False): "qwen3", (True, True): "qwen3_moe"}
    return name[has_head_norms, has_experts]
