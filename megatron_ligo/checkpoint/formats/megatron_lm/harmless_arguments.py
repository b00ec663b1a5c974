"""Names of Megatron-LM's run arguments that do not change what a Llama computes, each group with its reason.

Taken from the argument parsers and config classes of Megatron-LM 1.0 to 0.19 and of its main branch in November 2026,
from Megatron-DeepSpeed's, and from Megatron-Bridge's model providers.
"""

from __future__ import annotations

from collections.abc import Mapping

# Reason -> names, separated by blanks.
_GROUPS: Mapping[str, str] = {
    "whether there is a table of positions shows in the tensors": "add_position_embedding",
    "they concern experts: expert_arguments.py checks them where the model has any": """
        create_moe_param_group dense_grouped_gemm enable_expert_tensor_parallelism expert_gtp_weight_remat_size
        expert_interval expert_model_parallel_size expert_tensor_parallel_num_weight_shards
        expert_tensor_parallel_size inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        moe_apply_probs_on_input moe_aux_loss_coeff moe_combine_bwd_dtype moe_deepep_num_sms moe_dispatch_fwd_dtype
        moe_enable_deepep moe_enable_routing_replay moe_eval_capacity_factor moe_expert_capacity_factor
        moe_expert_parallel_size moe_expert_rank_capacity_factor moe_extended_tp moe_ffn_hidden_size
        moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grad_scale_func moe_grouped_gemm
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
        moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps
        moe_latent_size moe_layer_freq moe_layer_recompute moe_loss_coeff moe_min_capacity moe_mlp_glu_interleave_size
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_expert_input_to_capacity
        moe_pad_experts_for_cuda_graph_inference moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_per_layer_logging moe_permute_fusion
        moe_permute_fusion_into_hybridep moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias
        moe_router_force_biased moe_router_force_load_balancing moe_router_fusion moe_router_group_topk
        moe_router_load_balancing_type moe_router_num_groups moe_router_padding_for_fp8
        moe_router_padding_for_quantization moe_router_pre_softmax moe_router_quantile_balancing_ema
        moe_router_score_function moe_router_topk_limited_devices moe_router_topk_scaling_factor
        moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits moe_routing_trace_dump_weights
        moe_routing_trace_max_training_iters moe_routing_trace_path moe_shared_expert_gate
        moe_shared_expert_glu_interleave_size moe_shared_expert_intermediate_size moe_shared_expert_overlap
        moe_single_grouped_bias moe_single_grouped_weight moe_token_dispatcher_type moe_token_drop_policy
        moe_token_dropping moe_top2_2nd_expert_sampling moe_train_capacity_factor moe_upcycling_granularity
        moe_use_grouped_tensor moe_use_legacy_grouped_gemm moe_use_upcycling moe_z_loss_coeff
        overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm
        rl_inference_expert_model_parallel_size rl_inference_expert_tensor_model_parallel_size topk
        use_grouped_gemm_for_shared_expert use_tutel
    """,
    "read by multi-latent attention only (multi_latent_attention is fixed)": """
        beta_fast beta_slow cache_mla_latents kv_lora_rank mla_down_proj_fusion original_max_position_embeddings
        q_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    """,
    "read by Mamba, hybrid and linear-attention layers only (their switches are fixed)": """
        disable_mamba_mem_eff_path dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
        dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
        dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq
        dsa_indexer_use_sparse_loss dsa_kernel_backend experimental_attention_variant_loss_scale_func
        gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute gdp_num_householder
        inference_dynamic_batching_mamba_memory_ratio linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads
        linear_num_value_heads linear_value_head_dim mamba2_n_heads mamba_d_inner mamba_head_dim
        mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype mamba_num_groups mamba_num_heads
        mamba_state_dim mamba_training_ssm_states_dtype use_mamba_mem_eff_path
    """,
    "read by multi-token prediction only (mtp_num_layers is fixed)": """
        mtp_detach_heads mtp_grad_scale_func mtp_hsm mtp_loss_scaling_factor mtp_standalone mtp_use_repeated_layer
    """,
    "read under use_mup and enable_mhc_connections only (both are fixed)": """
        mhc_init_gating_factor mhc_num_residual_streams mhc_recompute_layer_num mhc_sinkhorn_iterations
        mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
    """,
    "read by encoders, vision and retrieval models only, which have other tensors": """
        bert_binary_head bert_embedder_type bert_load biencoder_projection_dim biencoder_shared_query_context_model
        block_data_path classes_fraction data_per_class_fraction data_sharding decoder_num_layers dino_bottleneck_size
        dino_freeze_last_layer dino_head_hidden_size dino_local_crops_number dino_local_img_size dino_norm_last_layer
        dino_teacher_temp dino_warmup_teacher_temp dino_warmup_teacher_temp_epochs embedding_path evidence_data_path
        faiss_use_gpu fim_data fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token
        fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token head_lr_mult ict_head_size ict_load
        img_dim img_h img_w indexer_batch_size indexer_log_interval iter_per_epoch mask_factor mask_type num_channels
        num_classes output_bert_embeddings patch_dim query_in_block_prob relative_attention_max_distance
        relative_attention_num_buckets report_topk_accuracies retriever_report_topk_accuracies retriever_score_scaling
        retro_attention_gate retro_bert_tokenizer_type retro_bert_vocab_file retro_block_size retro_chunk_length
        retro_cyclic_train_iters retro_encoder_attention_dropout retro_encoder_hidden_dropout retro_encoder_layers
        retro_neighbor_dirs retro_num_neighbors retro_num_retrieved_chunks retro_project_dir retro_return_doc_ids
        retro_split_preprocessing retro_verify_neighbor_count retro_workdir swin_backbone_type titles_data_path
        use_one_sent_docs vision_backbone_type vision_pretraining vision_pretraining_type
    """,
    "read under fp8 or fp4 only (argument_keys.QUANTIZATION)": """
        activation_func_fp8_input_store disable_parameter_transpose_cache first_last_layers_bf16 fp4_recipe
        fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_recipe fp8_wgrad
        keep_fp8_transpose_cache keep_fp8_transpose_cache_when_using_custom_fsdp kitchen_attention_backend
        num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 tp_only_amax_red
    """,
    "reinforcement learning": """
        grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_default_temperature grpo_default_top_p grpo_entropy_term_weight
        grpo_filter_groups_with_same_reward grpo_group_size grpo_iterations grpo_kl_beta grpo_prompts_per_step
        grpo_samples_per_iteration langrl_env_config langrl_external_server
        langrl_inference_server_conversation_template langrl_inference_server_type perform_rl_step refit_method
        rl_calculate_intra_group_similarity rl_consumption_granularity rl_default_temperature rl_default_top_k
        rl_default_top_p rl_durable_rollout_bank rl_enforce_generation_order rl_generation_batch_size
        rl_generation_lag rl_importance_sampling_truncation_coef rl_inference_logprobs_is_correction
        rl_inference_model_unified_memory_level rl_inference_parsers rl_inference_pipeline_model_parallel_size
        rl_inference_tensor_model_parallel_size rl_kv_cache_management_mode rl_max_inflight_requests
        rl_num_parallel_generation_batches rl_num_parallel_generations rl_offload_inference_model_weights_when_idle
        rl_offload_kv_cache_during_training rl_offload_optimizer_during_inference rl_parallel_generation_tasks
        rl_partial_rollouts rl_persist_cuda_graphs rl_profile rl_profile_dir rl_prompts_per_eval
        rl_remove_kv_cache_during_training rl_reset_cuda_graphs rl_rollout_bank_dir rl_rollout_bank_max_bytes
        rl_sequence_packing_algo rl_sequence_packing_bin_size rl_sequence_packing_max_sequences_per_bin
        rl_skip_bos_token rl_submission_granularity rl_training_cuda_graphs rl_use_sequence_packing
        rl_verify_model_weights_swap
    """,
    "inference: batching, caches and graphs": """
        cuda_graph_impl cuda_graph_modules cuda_graph_scope cuda_graph_scope_deprecated cuda_graph_warmup_steps
        decode_only_cuda_graphs disable_chunked_prefill enable_chunked_prefill enable_cuda_graph external_cuda_graph
        flash_decode inference inference_batch_times_seqlen_threshold inference_coordinator_port
        inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens inference_cuda_graph_scope
        inference_disable_ep_consensus inference_disable_triton_nvls_kernels inference_dynamic_batching
        inference_dynamic_batching_async_sched_mode inference_dynamic_batching_block_size
        inference_dynamic_batching_buffer_guaranteed_fraction inference_dynamic_batching_buffer_overflow_factor
        inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_chunk_size
        inference_dynamic_batching_cuda_graph_max_tokens inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution inference_dynamic_batching_enable_prefix_caching
        inference_dynamic_batching_logprobs_mode inference_dynamic_batching_max_requests
        inference_dynamic_batching_max_requests_override inference_dynamic_batching_max_tokens
        inference_dynamic_batching_max_tokens_override inference_dynamic_batching_num_cuda_graphs
        inference_dynamic_batching_paused_buffer_size_gb inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_eviction_policy inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_sampling_backend
        inference_dynamic_batching_track_generated_token_events inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_unified_memory_level inference_fuse_tp_communication inference_grouped_gemm_backend
        inference_logging_step_interval inference_max_batch_size inference_max_requests inference_max_seq_length
        inference_rng_tracker inference_sampling_seed inference_shards inference_text_gen_server_logging
        inference_use_synchronous_zmq_collectives inference_wandb_logging max_tokens_to_oom mlp_chunks_for_prefill
        nccl_all_reduce_for_prefill num_speculative_tokens offset_sampling_seed_by_dp_rank return_log_probs
        skip_prompt_log_probs symmetric_ar_type use_flashinfer_fused_rope use_legacy_static_engine
    """,
    "initialization, regularization and optimizer": """
        adam_beta1 adam_beta2 adam_eps adaptive_muon_beta2 adaptive_muon_eps adaptive_muon_moment2_method
        apply_wd_to_qk_layernorm attention_dropout clip_grad cpu_optimizer cpu_torch_adam data_parallel_random_init
        decoupled_lr decoupled_min_lr decoupled_weight_decay ds_fused_adam dump_param_to_param_group_map
        embedding_init_method embedding_init_method_std end_weight_decay exp_avg_dtype exp_avg_sq_dtype
        freeze_all_layers grad_norm_skip_threshold hidden_dropout init_method init_method_std
        init_method_xavier_uniform lion_beta1 lion_beta2 log_max_attention_logit lr lr_decay_iters lr_decay_samples
        lr_decay_steps lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples
        lr_warmup_steps lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style main_grads_dtype main_params_dtype
        megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype min_lr muon_coefficient_type
        muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum muon_nesterov muon_num_ns_steps
        muon_scalar_optimizer muon_scale_mode muon_split_qkv muon_tp_mode muon_use_nesterov muon_use_syrk
        no_weight_decay_cond_type optimizer optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction
        output_layer_init_method overlap_cpu_optimizer_d2h_h2d override_lr_scheduler override_opt_param_scheduler
        perform_initialization pin_cpu_grads pin_cpu_params qk_clip qk_clip_alpha qk_clip_threshold scaled_init_method
        seed sgd_momentum soap_precondition_frequency soap_shampoo_beta soap_use_kl_shampoo start_weight_decay
        store_param_remainders use_checkpoint_lr_scheduler use_checkpoint_opt_param_scheduler use_cpu_initialization
        use_layer_wise_distributed_optimizer use_precision_aware_optimizer use_torch_optimizer_for_cpu_offload warmup
        wd_incr_steps weight_decay weight_decay_incr_style wsd_decay_steps
    """,
    "samples and tokenizer": """
        actual_seq_length allow_ambiguous_pad_tokens aml_data_download_path chat_template
        create_attention_mask_in_dataloader curriculum_learning_legacy curriculum_scheduler curriculum_seqlen
        data_args_path data_cache_path data_efficiency_curriculum_learning data_efficiency_curriculum_learning_numel
        data_efficiency_curriculum_learning_seqlen_type data_impl data_path dataloader_defer_npy_index_mmap
        dataloader_fast_cache_load dataloader_inter_document_masking dataloader_seq_length dataloader_type
        dataset_impl decoder_seq_length deepspeed_dataloader encoder_seq_length eod_mask_loss eos_id generation_config
        hf_model_id hf_model_revision legacy_tokenizer make_vocab_size_divisible_by mask_prob merge_file metadata_path
        mid_level_dataset_surplus mmap_bin_files mmap_warmup mock_data null_tokenizer_eod_id null_tokenizer_pad_id
        num_dataset_builder_threads num_workers object_storage_cache_path pad_vocab_size per_dataset_sequences_path
        per_split_data_args_path phase_transition_iterations renormalize_blend_weights repeated_dataloader
        reset_attention_mask reset_position_ids retriever_seq_length return_data_index s3_cache_path sample_rate
        seq_length sft sft_tokenizer_prompt_format short_seq_prob should_pad_vocab special_tokens split test_data_path
        tiktoken_num_special_tokens tiktoken_pattern tiktoken_special_tokens tokenizer_hf_include_special_tokens
        tokenizer_hf_no_include_special_tokens tokenizer_hf_no_use_fast tokenizer_hf_use_fast tokenizer_metadata
        tokenizer_model tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy
        tokenizer_special_tokens tokenizer_type train_data_exact_num_epochs train_data_path train_desc_path
        train_doc_idx_path train_idx_path train_sample_idx_path train_shuffle_idx_path trust_remote_code
        use_dataset_only use_gigatoken valid_data_path vocab_extra_ids vocab_file
    """,
    "saving and loading; the tensors say what is stored": """
        async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm async_save async_strategy
        auto_detect_ckpt_format ckpt_assume_constant_structure ckpt_convert_format ckpt_convert_save
        ckpt_convert_update_legacy_dist_opt_format ckpt_drop_redundant_extra_state ckpt_format
        ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_load_per_rank_objects
        ckpt_fully_parallel_load_process_group ckpt_fully_parallel_save ckpt_fully_parallel_save_deprecated
        ckpt_fully_parallel_save_process_group ckpt_load_validate_sharding_integrity ckpt_pg_tensors_cache_create
        ckpt_pg_tensors_cache_path ckpt_step deprecated_use_mcore_models dist_ckpt_format dist_ckpt_format_deprecated
        dist_ckpt_optim_fully_reshardable dist_ckpt_save_pre_mcore_014 dist_ckpt_strictness dist_ckpt_workers
        distrib_optim_fully_reshardable_mem_efficient exit_on_missing_checkpoint export_te_mcore_model
        extra_checkpoint_metadata finetune fully_parallel_load fully_parallel_save hetereogenous_dist_checkpoint
        iteration lazy_mpu_init load load_main_params_from_ckpt load_model_opt_format load_optim load_rng load_tag
        model_type most_recent_k no_load_lr_state no_load_optim no_load_rng no_save_optim no_save_rng
        non_persistent_ckpt_type non_persistent_global_ckpt_dir non_persistent_local_ckpt_algo
        non_persistent_local_ckpt_dir non_persistent_save_interval override_ckpt_iteration pretrained_checkpoint
        reset_iteration save save_activations_interval save_dgrads_interval save_interval save_optim
        save_params_interval save_retain_interval save_rng save_tokenizer_assets save_tokens_per_expert_interval
        save_wgrads_interval stream_ckpt_dequant strict_fsdp_dtensor_load universal_checkpoint use_checkpoint_args
        use_dist_ckpt use_dist_ckpt_deprecated use_legacy_models use_mcore_models use_mp_args_from_checkpoint_args
        use_persistent_ckpt_worker use_tokenizer_model_from_checkpoint_args verify_integrity
    """,
    "logging, profiling and distillation targets": """
        app_tag_run_name app_tag_run_version barrier_with_L1_time config_logger_dir disable_straggler_on_startup
        enable_one_logger filter_warnings log_batch_size_to_tensorboard log_device_memory_used log_energy log_interval
        log_l2_norm_grad_to_tensorboard log_learning_rate_to_tensorboard log_loss_scale_to_tensorboard
        log_memory_interval log_memory_to_tensorboard log_num_zeros_in_grad log_optimizer_states_to_tensorboard
        log_params_norm log_progress log_runtime_to_tensorboard log_straggler log_throughput
        log_throughput_to_tensorboard log_timers_to_tensorboard log_validation_ppl_to_tensorboard
        log_world_size_to_tensorboard logger_iteration logging_level logits_load_decode_threads logits_load_dir
        logits_load_ignore_errors logits_load_kd_loss_alpha logits_load_msc_prefetch_depth logits_load_prefetch_factor
        logits_save_dir logits_save_dtype logits_save_top_k logits_save_top_p logits_save_top_p_min_k memory_keys
        memory_snapshot_path modules_to_filter nvtx_ranges one_logger_async one_logger_entity one_logger_project
        one_logger_run_name otel_enabled otel_service_name otel_span_groups profile profile_backward profile_ranks
        profile_step_end profile_step_start profile_steps pytorch_profiler_collect_callstack
        pytorch_profiler_collect_chakra pytorch_profiler_collect_shapes record_memory_history record_shapes
        runtime_time_unit save_config_filepath set_level_for_all_loggers straggler straggler_ctrlr_port
        straggler_minmax_count tensorboard_dir tensorboard_log_interval tensorboard_queue_size throughput_window_size
        timers timing_log_level timing_log_option use_nsys_profiler wandb_entity wandb_exp_name wandb_project
        wandb_save_dir
    """,
    "restarts and fault tolerance": """
        adlr_autoresume adlr_autoresume_interval calc_ft_timeouts check_for_nan_in_loss disable_msc_deprecated
        enable_ft_package enable_msc error_injection_rate error_injection_type exit_duration_in_mins exit_interval
        exit_signal exit_signal_handler exit_signal_handler_for_dataloader exit_signal_handler_for_training
        ft_num_warmup_iters inprocess_active_world_size inprocess_barrier_timeout inprocess_completion_timeout
        inprocess_empty_cuda_cache inprocess_granularity inprocess_hard_timeout inprocess_heartbeat_interval
        inprocess_heartbeat_timeout inprocess_last_call_wait inprocess_max_iterations
        inprocess_monitor_process_interval inprocess_monitor_thread_interval inprocess_progress_watchdog_interval
        inprocess_restart inprocess_soft_timeout inprocess_termination_grace_time kill_switch_file rerun_mode
        run_workload_inspector_server
    """,
    "layout and communication over ranks": """
        DDP_impl _cpu_offloading_context _pg_collection account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split align_grad_reduce align_param_gather autocast_dtype average_in_collective
        batch_p2p_comm batch_p2p_sync bucket_size check_for_nan_in_grad clone_scatter_output_in_embedding
        context_parallel_size cp_comm_type cpu_offloading_activations cpu_offloading_double_buffering
        cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers cpu_offloading_weights
        create_all_gather_group data_parallel_sharding_strategy data_parallel_size ddp_average_in_collective
        ddp_bucket_size ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw
        ddp_param_name_patterns_for_fp32_local_accumulation ddp_reduce_scatter_with_fp32_accumulation
        deallocate_pipeline_outputs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        defer_embedding_wgrad_compute delay_grad_reduce delay_param_gather disable_symmetric_registration
        distributed_backend distributed_timeout_minutes distributed_timeout_seconds_after_init ds_pipeline_enabled
        ds_sequence_parallel_fpdt ds_sequence_parallel_fpdt_chunk_size ds_sequence_parallel_fpdt_offloading
        ds_sequence_parallel_size enable_autocast enable_full_sharding_in_hsdp enable_gloo_process_groups
        enable_zbh1_exact_semantics enable_zbh1_pipeline encoder_pipeline_model_parallel_size
        encoder_tensor_model_parallel_size ep_overlap_early_attn_memory_release fake_process_group
        finalize_model_grads_func first_pipeline_num_layers flight_recorder_dump_on_timeout flight_recorder_dump_path
        flight_recorder_extra_dump_on_exec flight_recorder_include_only_active flight_recorder_include_stack_trace
        flight_recorder_trace_buffer_size force_ds_sequence_parallel fsdp_all_gather_in_start_param_sync
        fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration grad_reduce_in_fp32
        grad_scale_func grad_sync_func gradient_reduce_div_fusion gtp_expert_remat_nccl_ub gtp_remat_nccl_ub
        gtp_remat_opt_in_modules gtp_remat_reduce_scatter_with_fp32_accumulation gtp_weight_remat_size
        hierarchical_context_parallel_sizes high_priority_a2a_comm_stream high_priority_stream_groups
        hybrid_context_parallel init_model_with_meta_device last_pipeline_num_layers local_rank
        max_seqlen_per_dp_cp_rank megatron_fsdp_cuda_graph_mode megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_grad_comm_dtype megatron_fsdp_max_pool_double_buffer megatron_fsdp_use_decoupled_grad
        megatron_fsdp_version microbatch_group_size_per_vp_stage model_parallel_size nccl_communicator_config_path
        nccl_ub no_pipeline_parallel no_sync_func num_buckets num_distributed_optimizer_instances
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage
        num_microbatches_with_partial_activation_checkpoints num_virtual_stages_per_pipeline_rank
        orig_global_batch_size orig_micro_batch_size outer_dp_sharding_strategy overlap_grad_reduce overlap_p2p_comm
        overlap_p2p_comm_warmup_flush overlap_param_gather overlap_param_gather_with_optimizer_step
        pad_buckets_for_high_nccl_busbw parallel_output param_name_patterns_for_fp32_local_accumulation
        param_sync_func pg_collection pipeline_dtype pipeline_model_parallel_comm_backend
        pipeline_model_parallel_layout pipeline_model_parallel_size pipeline_model_parallel_split_rank post_process
        pre_process preserve_fp32_weights rank reduce_scatter_with_fp32_accumulation remote_device replication
        replication_factor replication_jump scatter_embedding_sequence_parallel scatter_gather_tensors_in_pipeline
        scattered_embeddings sequence_parallel sharp_enabled_group split_transformers standalone_embedding_stage
        suggested_communication_unit_size tensor_model_parallel_size tensor_parallel_num_weight_shards
        torch_fsdp2_reshard_after_forward tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend
        tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_cfg
        tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
        tp_comm_split_ag tp_comm_split_rs transformer_pipeline_model_parallel_size use_contiguous_buffers_in_ddp
        use_contiguous_buffers_in_local_ddp use_custom_fsdp use_distributed_optimizer use_gloo_process_groups
        use_layer_wise_param_layout use_megatron_fsdp use_pin_memory use_ring_exchange_p2p use_sharp
        use_te_rng_tracker use_torch_fsdp2 use_tp_pp_dp_mapping variable_seq_lengths
        virtual_pipeline_model_parallel_size vp_stage wgrad_deferral_limit world_size zero_allgather_bucket_size
        zero_contigious_gradients zero_reduce_bucket_size zero_reduce_scatter zero_stage
    """,
    "numerics within rounding, fused kernels, memory": """
        accumulate_allreduce_grads_in_fp32 activation_offload_fraction apply_query_key_layer_scaling apply_rope_fusion
        attention_backend attention_softmax_in_fp32 attn_mask batch_invariant_backend batch_invariant_mode bf16
        bias_dropout_add_fusion bias_dropout_fusion bias_swiglu_fusion calculate_per_token_loss cpu_offloading
        cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_retain_backward_graph
        cuda_graph_use_single_mempool delay_offload_until_cuda_graph delay_wgrad_compute
        delta_offload_bytes_across_pp_ranks deterministic_mode disable_bf16_reduced_precision_matmul disable_jit_fuser
        ds_inference dynamic_loss_scale embedding_weights_in_fp32 fine_grained_activation_offloading
        fine_grained_offloading_max_inflight_offloads flash_attention_version fp16 fp16_lm_cross_entropy
        fp32_allreduce fp32_residual_connection fused_residual_rmsnorm fused_single_qkv_rope grad_reduce_in_bf16
        gradient_accumulation_fusion heterogeneous_dist hysteresis initial_loss_scale logit_dtype loss_scale
        loss_scale_window masked_softmax_fusion mem_efficient_ln memory_centric_tiled_linear
        memory_efficient_layer_norm min_loss_scale min_offloaded_tensor_size min_scale mlp_chunks_for_training
        no_persist_layer_norm offload_modules onnx_safe params_dtype persist_layer_norm recompute_activations
        recompute_granularity recompute_method recompute_modules recompute_num_layers
        reuse_grad_buf_for_mxfp8_param_ag rotary_pos_emb scaled_masked_softmax_fusion
        scaled_upper_triang_masked_softmax_fusion te_rng_tracker tile_factor transformer_engine use_flash_attn
        use_flash_attn_builder use_flash_attn_triton use_flash_attn_v1 use_flash_attn_v2
        use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp use_inference_optimized_layers
        use_transformer_engine_full_layer_spec use_transformer_engine_op_fuser
    """,
    "length, batches and evaluation of the run": """
        _is_global_batch_size_explicitly_specified async_tensor_model_parallel_allreduce
        batch_size builder check_for_large_grads check_for_nan_in_loss_and_grad check_for_spiky_loss
        check_weight_hash_across_dp_replicas_interval checkpoint_activations checkpoint_in_cpu checkpoint_num_layers
        consumed_train_bins consumed_train_samples consumed_train_tokens consumed_valid_samples
        contigious_checkpointing curr_iteration data_step_fn decrease_batch_size_if_needed
        deepspeed_activation_checkpointing deepspeed_config deepspeed_config_dict distribute_checkpointed_activations
        distribute_saved_activations do_test do_train do_valid empty_unused_memory_level enable_experimental
        eval_global_batch_size eval_interval eval_iters eval_micro_batch_size forward_step_fn full_validation
        gc_interval_train gc_interval_val get_attention_mask_from_fusion global_batch_size gpu_sniff_test_interval
        hidden_size_teacher iterations_to_skip kd kd_alpha_ce kd_beta_ce kd_temp load_teacher lr_decay_tokens
        lr_warmup_tokens manual_gc manual_gc_eval manual_gc_interval micro_batch_size mos multiple_validation_sets
        num_attention_heads_teacher num_experts_teacher num_floating_point_operations_so_far num_layers_teacher
        partition_activations post_wrap_hooks pre_wrap_hooks rampup_batch_size random_ltd random_ltd_layer_num
        random_ltd_reserved_length result_rejected_tracker_filename skip_train skipped_train_samples
        start_eval_at_iter step_batch_size_schedule synchronize_each_layer teacher_forward teacher_model test_mode
        train_iters train_iters_per_epoch train_samples train_sync_interval train_tokens use_pytorch_profiler
        validation_set_names
    """,
}
HARMLESS: Mapping[str, str] = {name: reason for reason, names in _GROUPS.items() for name in names.split()}
