"""Good files of every kind that the commands read, small, and what reading them gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.io import iteration_folders
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import DataError, ErrorCollector
from megatron_ligo.config.run_config import OperatorSection, RunConfig
from megatron_ligo.data.indexed_dataset import open_indexed_files
from megatron_ligo.data.tokenizer import load_tokenizer
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.operator import InitialOperator
from megatron_ligo.models.full.universal_loading import check_files_are_safe
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.testing.fuzz import torch_dist_mutators
from megatron_ligo.testing.fuzz.engine_samples import add_optimizer
from megatron_ligo.training.checkpointing import run_checkpoints

DIMS = ModelConfig(
    arch="llama", model_type="llama", num_layers=2, hidden_size=16, ffn_size=24, num_heads=4, num_kv_heads=2,
    head_dim=4, vocab_size=50, max_positions=32, norm_eps=1e-5, rope_base=10000.0,
)  # fmt: skip
CONFIG = """
[small]
path = "a"
[large]
num_layers = 3
[operator]
share = {{default = "all", ffn = "layer"}}
[fit]
steps = {steps}
lr = 1e-4
betas = [0.9, 0.95]
[data]
train = ["b"]
"""
MODEL, GGUF = "model", "model.gguf"
TEXT = "Good files, 1 2 3.\n\tAnd more."

Look = Callable[[Path], object]
Make = Callable[[Path, int], None]


@dataclass(frozen=True)
class Sample:
    """make: into a folder, with numbers that depend on a seed.
    look: reads all that a folder holds, into plain data that is the same for the same content."""

    name: str
    make: Make
    look: Look


class Small(Reader):
    """A model of random numbers, with the moments of Adam after seven steps."""

    format, path, step = "drawn", None, 7
    model_config = DIMS
    has_moments = True

    def __init__(self, seed: int):
        self.seed = seed

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(self.param(key).shape(self.model_config), torch.float32)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{kind}:{key}".encode()).digest()[:7], "little")
        drawn = torch.randn(self.param(key).shape(self.model_config), generator=torch.Generator().manual_seed(seed))
        return drawn.abs() if kind == MOMENTS[1] else drawn


def digest(*tensors: Tensor) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def checkpoint(folder: Path) -> dict:
    """All tensors of a checkpoint of any format, and what is carried beside."""
    place = folder / (GGUF if not (folder / MODEL).exists() else MODEL)
    reader = formats.open(place)
    if reader.format == "universal":
        # DeepSpeed reads files of it that our reader has no use for.
        check_files_are_safe(place)
    kinds = (WEIGHT, *MOMENTS) if reader.has_moments else (WEIGHT,)
    found = {key: digest(*(reader.read(key, kind) for kind in kinds)) for key in reader.keys()}  # noqa: SIM118
    return {"dims": reader.model_config.to_json(), "step": reader.step, "tensors": found}


def _converted(to: str, **options) -> Make:
    def make(folder: Path, seed: int) -> None:
        convert(Small(seed), folder / MODEL, to, WriteOptions(**options))

    return make


def _engine(stage: int) -> Make:
    def make(folder: Path, seed: int) -> None:
        _converted("deepspeed", extra={"tag": "step_0"})(folder, seed)
        add_optimizer(folder / MODEL / "step_0", stage)

    return make


def _distributed(folder: Path, seed: int) -> None:
    """As Megatron-core leaves it from 0.19 on, with an optimizer."""
    _converted("mcore")(folder, seed)
    torch_dist_mutators.as_an_engine_leaves_it(iteration_folders.require_folder(folder / MODEL))


def _meta(folder: Path, seed: int) -> None:
    """As Meta has it, without our own record beside."""
    _converted("fairscale", tp=2)(folder, seed)
    for name in ("dims.json", "manifest.json"):
        (folder / MODEL / name).unlink()


def _gguf(folder: Path, seed: int) -> None:
    writer = gguf.GGUFWriter(folder / GGUF, "llama")
    for add, value in (
        (writer.add_block_count, DIMS.num_layers), (writer.add_context_length, DIMS.max_positions),
        (writer.add_embedding_length, DIMS.hidden_size), (writer.add_feed_forward_length, DIMS.ffn_size),
        (writer.add_head_count, DIMS.num_heads), (writer.add_head_count_kv, DIMS.num_kv_heads),
        (writer.add_key_length, DIMS.head_dim), (writer.add_value_length, DIMS.head_dim),
        (writer.add_rope_dimension_count, DIMS.head_dim), (writer.add_rope_freq_base, DIMS.rope_base),
        (writer.add_layer_norm_rms_eps, DIMS.norm_eps), (writer.add_vocab_size, DIMS.vocab_size),
    ):  # fmt: skip
        add(value)
    source = Small(seed)
    for name, item in fused_tensors.stored_tensors(source.arch, DIMS, "gguf").items():
        tensor = source.read(item.keys[0])
        if item.params[0].locations["gguf"].interleaved:
            tensor = fused_tensors.interleave(tensor, DIMS.head_dim)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _run(folder: Path, seed: int) -> None:
    """A checkpoint as a run leaves it."""
    place = folder / "checkpoints/step_7"
    convert(Small(seed), place, "deepspeed", WriteOptions(extra={"tag": run_checkpoints.ENGINE_TAG}))
    record = {"step": 7, "state": {"losses": {}}, "layout": {"tp": 1, "pp": 1, "dp": 1, "zero": 1}}
    run_checkpoints.write_record(place, None, {}, record)


def run(folder: Path) -> object:
    """What a run goes on from: the newest checkpoint's state, and the content of its files."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = run_checkpoints.find_newest(folder / "checkpoints")
    assert found is not None
    names = sorted(path for path in found.folder.rglob("*.pt"))
    return found.step, found.state, [hashlib.sha256(path.read_bytes()).hexdigest() for path in names]


def _operator(folder: Path, seed: int) -> None:
    large = replace(DIMS, num_layers=3, hidden_size=24, ffn_size=36, num_heads=8, num_kv_heads=4, head_dim=4)
    operator = InitialOperator(DIMS, large, OperatorSection(noise=0.1, seed=seed))
    operator_file.write_operator(
        operator, ((name, operator.tensor(name)) for name in operator.shapes()), folder / "operator", {}
    )


def operator(folder: Path) -> object:
    saved = operator_file.OperatorFile(folder / "operator")
    large, settings = saved.large.to_json(), saved.record["settings"]
    return large, settings, {name: digest(saved.tensor(name)) for name in saved.shapes()}


def _data(folder: Path, seed: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    for _ in range(20):
        ids = draw.integers(0, DIMS.vocab_size, draw.integers(5, 40))
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(folder / "text.idx"))


def data(folder: Path) -> object:
    errors = ErrorCollector("data", DataError)
    pair = open_indexed_files(str(folder / "text"), errors)
    errors.raise_if_any()
    return pair.dtype.__name__, pair.documents, pair.tokens, pair.token_range()


def _tokenizer(folder: Path, seed: int) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.train_from_iterator([f"{TEXT} {seed}"] * 20, trainer)
    inner.save(str(folder / "tokenizer.json"))


def tokenizer(folder: Path) -> object:
    found = load_tokenizer(folder)
    return found.encode(TEXT), found.vocab_size, found.eod


def _config(folder: Path, seed: int) -> None:
    (folder / "run.toml").write_text(CONFIG.format(steps=20 + seed))


def config(folder: Path) -> object:
    return RunConfig.load(folder / "run.toml").to_dict()


SAMPLES = (
    Sample("hf", _converted("hf"), checkpoint),
    Sample("hf, sharded", _converted("hf", extra={"shard_bytes": 4000}), checkpoint),
    Sample("gguf", _gguf, checkpoint),
    Sample("universal", _converted("universal"), checkpoint),
    Sample("deepspeed", _converted("deepspeed", tp=2), checkpoint),
    Sample("deepspeed, ZeRO 2", _engine(2), checkpoint),
    Sample("deepspeed, ZeRO 3", _engine(3), checkpoint),
    Sample("pipeline", _converted("pipeline", tp=2, pp=2), checkpoint),
    Sample("torch_dist", _converted("mcore"), checkpoint),
    Sample("torch_dist, as an engine leaves it", _distributed, checkpoint),
    Sample("fairscale", _meta, checkpoint),
    Sample("run", _run, run),
    Sample("operator", _operator, operator),
    Sample("data", _data, data),
    Sample("tokenizer", _tokenizer, tokenizer),
    Sample("config", _config, config),
)
