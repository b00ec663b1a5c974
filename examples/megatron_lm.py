"""Prints the command line with which Megatron-LM's pretrain_gpt.py starts from a grown model.

    python examples/megatron_lm.py runs/grown runs/grown-mcore --tp 2 --pp 2

Writes the model as a torch_dist checkpoint (any tp and pp can load it), and prints the arguments that its weights
imply. Add your data, batch sizes and schedule.
"""

from __future__ import annotations

import argparse
import shlex

import megatron_ligo as ligo

# Fields of the sizes -> arguments.
SIZES = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_size": "--ffn-hidden-size",
    "num_heads": "--num-attention-heads",
    "head_dim": "--kv-channels",
    "max_positions": "--max-position-embeddings",
    # Growth changes it.
    "norm_eps": "--norm-epsilon",
    "rope_base": "--rotary-base",
}


def megatron_arguments(dims: dict, tp: int, pp: int) -> list[str]:
    """Returns the arguments that a Llama of these sizes needs."""
    words = []
    for name, argument in SIZES.items():
        value = dims[name]
        words += [argument, str(int(value)) if name == "rope_base" else str(value)]
    if dims["num_kv_heads"] != dims["num_heads"]:
        words += ["--group-query-attention", "--num-query-groups", str(dims["num_kv_heads"])]
    if not dims["tied"]:
        words.append("--untie-embeddings-and-output-weights")
    if dims["qkv_bias"]:
        words.append("--add-qkv-bias")
    words += ["--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"]
    words += ["--position-embedding-type", "rope", "--hidden-dropout", "0", "--attention-dropout", "0"]
    return [*words, "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hand-off, or any checkpoint")
    parser.add_argument("target", help="new folder for the torch_dist checkpoint")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args()

    ligo.convert(args.model, args.target, to="mcore")
    dims = ligo.inspect(args.target)["dims"]
    words = megatron_arguments(dims, args.tp, args.pp)
    # --finetune: begin at iteration 0, with a new optimizer.
    words += ["--load", args.target, "--ckpt-format", "torch_dist", "--finetune"]
    print(f"pretrain_gpt.py {shlex.join(words)}")


if __name__ == "__main__":
    main()
