"""Prepares a grown Llama for torchtitan: its weights, and the sizes of the model to register there.

    python examples/torchtitan_llama3.py runs/grown runs/grown-titan

Writes torch.distributed.checkpoint under torchtitan's names, with its order of rotary pairs. Prints the model's sizes,
and the options that load the weights without an optimizer's state.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import megatron_ligo as ligo

# Fields of the sizes -> those of torchtitan's Llama 3.
SIZES = {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "ffn_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_seq_len",
    "rope_base": "rope_theta",
    # Growth changes it.
    "norm_eps": "norm_eps",
    "tied": "enable_weight_tying",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hand-off of `ligo grow`, or any other checkpoint")
    parser.add_argument("output", help="new folder for torchtitan's checkpoint")
    args = parser.parse_args()
    ligo.convert(args.model, args.output, to="torchtitan")
    dims = ligo.inspect(args.model)["dims"]
    for name, field in SIZES.items():
        print(f"{field} = {dims[name]}")
    folder = Path(args.output).resolve()
    print(f"--checkpoint.enable --checkpoint.initial_load_path {folder} --checkpoint.initial_load_model_only")


if __name__ == "__main__":
    main()
