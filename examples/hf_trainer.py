"""Grows a model in memory and trains it with the Trainer of transformers.

    python examples/hf_trainer.py models/small corpus/ --output runs/trainer --num-layers 32 --hidden-size 768 \
        --ffn-size 2048 --num-heads 12 --num-kv-heads 4

For several GPUs, or processes on a CPU, start it with `torchrun --nproc-per-node N`: `accelerate launch` does the same
on GPUs, but starts one process with `--cpu`. The Trainer's folders (checkpoint-N) can be converted and grown again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

import megatron_ligo as ligo

LENGTH = 128


class Blocks(torch.utils.data.Dataset):
    """The tokens of all .txt files of a folder, in blocks of one length."""

    def __init__(self, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase, length: int):
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", help="folder of the small model, with its tokenizer")
    parser.add_argument("texts", type=Path, help="folder of .txt files")
    parser.add_argument("--output", required=True, help="folder of the training")
    parser.add_argument("--steps", type=int, default=100)
    for size in ("num-layers", "hidden-size", "ffn-size", "num-heads", "num-kv-heads"):
        parser.add_argument(f"--{size}", type=int, help="of the large model (default: the small model's)")
    args = parser.parse_args()

    small = transformers.AutoModelForCausalLM.from_pretrained(args.small, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.small)
    sizes = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads")
    large = ligo.grow(small, **{name: getattr(args, name) for name in sizes})
    trainer = transformers.Trainer(
        large,
        transformers.TrainingArguments(
            args.output,
            max_steps=args.steps,
            # Measured: half of the rate at which the large model would be trained from scratch.
            learning_rate=1.5e-4,
            per_device_train_batch_size=4,
            logging_steps=max(args.steps // 10, 1),
            report_to=[],
        ),
        train_dataset=Blocks(args.texts, tokenizer, min(LENGTH, large.config.max_position_embeddings)),
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{args.output}/final")


if __name__ == "__main__":
    main()
