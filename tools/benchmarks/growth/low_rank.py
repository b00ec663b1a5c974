"""Compares a fit at low rank with LoRA of as many trained numbers, for models whose training state does not fit.

Both begin at one lossless start and see the same samples in the same order; each has its best rate on seed 0. Full
training of the start on these samples says what the memory would have bought. From the repository, after half_wsd.toml:

    python tools/benchmarks/growth/low_rank.py runs/half_wsd/compare/jobs/source runs/shakespeare/data runs/low_rank

Rerun it to resume. Writes low_rank.json there: held-out losses, numbers trained, bytes of weights and Adam state.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import megatron_ligo as ligo
from megatron_ligo.api.sources import open_model
from megatron_ligo.checkpoint.formats.hf.transformers_model import build_model
from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.config.run_config import DataSection, FitSection
from megatron_ligo.data.dataset_factory import open_dataset
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.distributed.mesh import init_distributed
from megatron_ligo.experiments.compare.run_folder import last_checkpoint
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.training.lr_schedule import learning_rate

LARGE = {"num_layers": 4, "hidden_size": 64, "ffn_size": 176, "num_heads": 4, "num_kv_heads": 4}
STEPS, BATCH, LENGTH, EVAL = 200, 8, 64, 256
SEEDS, TUNING_SEED = (1, 2, 3), 0
# By kind: the rank (0: whole maps) and the rates; one three times as high is tried while the highest is the best.
KINDS = {
    "fit_low": (8, (1e-4, 3e-4, 1e-3, 3e-3)),
    "fit_whole": (0, (1e-3, 3e-3)),
    "lora_1": (1, (1e-3, 3e-3, 1e-2, 3e-2)),
    "lora_4": (4, (3e-3, 1e-2)),
    "lora_8": (8, (1e-3, 3e-3, 1e-2)),
    "full": (0, (1e-3, 2e-3, 4e-3, 8e-3)),
}


def main(source: Path, data: Path, output: Path) -> None:
    small = last_checkpoint(source)
    results = read_json(output / "low_rank.json") if (output / "low_rank.json").exists() else {"runs": {}}
    runs = results["runs"]

    def run(kind: str, seed: int, lr: float) -> float:
        name = f"{kind}/{seed}/{lr:g}"
        if name not in runs:
            train = _fit if kind.startswith("fit") else _train
            runs[name] = train(KINDS[kind][0], small, data, output / name.replace("/", "_"), seed, lr)
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "low_rank.json", results)
            print(name, runs[name], flush=True)
        return runs[name]["loss"]

    for kind, (_, rates) in KINDS.items():
        tries = {lr: run(kind, TUNING_SEED, lr) for lr in rates}
        while (best := min(tries, key=tries.__getitem__)) == max(tries):
            tries[best * 3] = run(kind, TUNING_SEED, best * 3)
        for seed in SEEDS:
            run(kind, seed, best)


def _fit(rank: int, small: str, data: Path, folder: Path, seed: int, lr: float) -> dict:
    settings = {
        "operator.method": "lossless",
        "operator.rank": rank,
        "operator.seed": seed,
        "fit.lr": lr,
        "fit.depth_lr": lr,
        "fit.global_batch_size": BATCH,
        "fit.micro_batch_size": BATCH,
        "fit.warmup_steps": STEPS // 10,
        "fit.eval_samples": EVAL,
        "fit.eval_every": 0,
        "fit.save_every": 0,
        "fit.keep": "last",
        "data.seq_length": LENGTH,
        "data.seed": seed,
    }
    operator = ligo.fit(
        small, LARGE, data=f"{data / 'train'}", valid=f"{data / 'valid'}", steps=STEPS, output=folder, settings=settings
    )
    trained = sum(build_initial_operator(operator.small, operator.large, operator.settings).count_parameters().values())
    frozen = _count(build_model(open_model(small), torch.float32))
    return _describe(ligo.grow(small, operator=operator), _open_data(small, data, folder, seed), trained, frozen)


class LoraLinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen, A: [r, in], B: [out, r], B zero at first (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int, seed: torch.Generator):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=seed) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * (x @ self.a.T) @ self.b.T


def _train(rank: int, small: str, data: Path, folder: Path, seed: int, lr: float) -> dict:
    model = ligo.grow(small, **LARGE)
    frozen = 0
    if rank:
        frozen = _count(model)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(block, name, LoraLinear(linear, rank, generator))
    parameters = [p for p in model.parameters() if p.requires_grad]
    dataset = _open_data(small, data, folder, seed)
    section = replace(FitSection(), lr=lr, steps=STEPS, warmup_steps=STEPS // 10)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(section, step)
        (batch,) = dataset.train_batch(step, BATCH, BATCH, 1, 0)
        _loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return _describe(model, dataset, sum(p.numel() for p in parameters), frozen)


def _open_data(small: str, data: Path, folder: Path, seed: int) -> ShardedSampler:
    section = DataSection(train=(f"{data / 'train'}",), valid=(f"{data / 'valid'}",), seq_length=LENGTH, seed=seed)
    return open_dataset(section, open_model(small).model_config, STEPS * BATCH, EVAL, folder)


@torch.no_grad()
def _describe(model: nn.Module, dataset: ShardedSampler, trained: int, frozen: int) -> dict:
    """Returns the held-out loss (nats a token) and the bytes of state (fp32)."""
    model.eval()
    parts = dataset.eval_parts(EVAL, 32, 1, 0)
    losses = [_loss(model, batch).item() * len(batch["tokens"]) for _, batches in parts for batch in batches]
    return {"loss": sum(losses) / EVAL, "trained": trained, "bytes": 4 * frozen + 16 * trained}


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["tokens"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    init_distributed(5.0)
    main(*map(Path, sys.argv[1:]))
