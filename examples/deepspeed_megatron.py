"""Trains a grown model in a DeepSpeed script of your own, over Megatron-core's GPTModel: any ZeRO stage, with TP.

    deepspeed --num_gpus 4 examples/deepspeed_megatron.py runs/grown --zero 3 --tp 2

The hand-off's weights are fp32, in Megatron-core's names. Its sizes are read from it: growth also changes the norms'
eps, which your model must have (`layernorm_epsilon` below).
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch.optim.lr_scheduler import LambdaLR

import megatron_ligo as ligo


def build_model(dims: dict, tp: int) -> GPTModel:
    """Returns a GPTModel of the sizes that `ligo.inspect` reports, for a Llama."""
    config = TransformerConfig(
        num_layers=dims["num_layers"],
        hidden_size=dims["hidden_size"],
        ffn_hidden_size=dims["ffn_size"],
        num_attention_heads=dims["num_heads"],
        num_query_groups=dims["num_kv_heads"],
        kv_channels=dims["head_dim"],
        layernorm_epsilon=dims["norm_eps"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=dims["qkv_bias"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=not torch.cuda.is_available(),
    )
    # The padding of the vocabulary to a multiple of tp.
    vocab_size = -(-dims["vocab_size"] // tp) * tp
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=vocab_size,
        max_sequence_length=dims["max_positions"],
        share_embeddings_and_output_weights=dims["tied"],
        position_embedding_type="rope",
        rotary_base=dims["rope_base"],
    )


def compute_loss(engine: deepspeed.DeepSpeedEngine, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Returns the mean next-token loss, a scalar, of token ids (batch, length)."""
    batch, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(batch, -1)
    # True where attention is masked: the future.
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    logits = engine(tokens, positions, mask)[:, :-1].transpose(0, 1).contiguous()
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    # The padding of the vocabulary is no token. (Megatron-LM counts it, so its first loss is a little higher.)
    logits[..., max(vocab_size - first, 0) :] = torch.finfo(logits.dtype).min
    return vocab_parallel_cross_entropy(logits, tokens[:, 1:].transpose(0, 1).contiguous()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("handoff", help="folder that `grow` wrote, or a universal checkpoint")
    parser.add_argument("--zero", type=int, default=1, choices=(1, 2, 3), help="ZeRO stage (default: 1)")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default: 1)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: 3)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()

    deepspeed.init_distributed()
    parallel_state.initialize_model_parallel(args.tp)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(1)
    else:
        # Megatron-core asks for the CUDA device even where there is none.
        torch.cuda.current_device = lambda: torch.device("cpu")
        # There is no dropout here, so no random numbers of CUDA are needed.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    dims = ligo.inspect(args.handoff)["dims"]
    model = build_model(dims, args.tp)
    if args.zero == 3 and args.tp > 1:
        ligo.prepare_for_universal(model, args.handoff)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        mpu=ligo.deepspeed_mpu(),
        # Your scheduler starts at its own beginning: load_universal leaves it alone.
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10)),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": args.zero},
            "checkpoint": {"load_universal": True},
        },
    )
    ligo.load_universal(engine, args.handoff)

    # Your data instead. Ranks of one TP group read the same samples.
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    length = min(128, dims["max_positions"])
    tokens = torch.randint(0, dims["vocab_size"], (2, length), generator=generator).to(engine.device)
    for step in range(args.steps):
        loss = compute_loss(engine, tokens, dims["vocab_size"])
        engine.backward(loss)
        engine.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    main()
