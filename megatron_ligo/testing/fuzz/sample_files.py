"""Small valid files of every kind that the commands read, and functions that read them completely."""

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
from megatron_ligo.common.seeding import seeded_generator
from megatron_ligo.config.run_config import OperatorSection, RunConfig
from megatron_ligo.data.indexed_dataset import open_indexed_files
from megatron_ligo.data.tokenizer import load_tokenizer
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.initial_operator import InitialOperator
from megatron_ligo.models.full.universal_loading import check_files_are_safe
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.testing.fuzz import torch_dist_mutators, torch_file_mutators
from megatron_ligo.testing.fuzz.engine_samples import write_engine_files
from megatron_ligo.training.checkpointing import run_checkpoints

MODEL_CONFIG = ModelConfig(
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

ReadSample = Callable[[Path], object]
WriteSample = Callable[[Path, int], None]


@dataclass(frozen=True)
class Sample:
    """write: fills a folder with numbers that depend on a seed. read: reads all content into comparable plain data.

    any_content: a damaged file may be a valid one with other content, as with text.
    """

    name: str
    write: WriteSample
    read: ReadSample
    any_content: bool = False


class RandomModelReader(Reader):
    """A random model with Adam's moments after seven steps."""

    format, path, step = "drawn", None, 7
    model_config = MODEL_CONFIG
    has_moments = True

    def __init__(self, seed: int):
        self.seed = seed

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(self.param(key).shape(self.model_config), torch.float32)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        generator = seeded_generator(self.seed, f"{kind}:{key}")
        tensor = torch.randn(self.param(key).shape(self.model_config), generator=generator)
        return tensor.abs() if kind == MOMENTS[1] else tensor


def tensor_digest(*tensors: Tensor) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def read_checkpoint(folder: Path) -> dict:
    """Reads all tensors, sizes and the step of a checkpoint of any format."""
    path = folder / (GGUF if not (folder / MODEL).exists() else MODEL)
    reader = formats.open(path)
    if reader.format == "universal":
        # DeepSpeed also reads files that our reader ignores.
        check_files_are_safe(path)
    kinds = (WEIGHT, *MOMENTS) if reader.has_moments else (WEIGHT,)
    keys = reader.keys()
    tensors = {key: tensor_digest(*(reader.read(key, kind) for kind in kinds)) for key in keys}
    carried = [reader.files and sorted((file.name, file.stat().st_size) for file in reader.files), reader.unread]
    return {"dims": reader.model_config.to_json(), "step": reader.step, "tensors": tensors, "carried": carried}


def _write_checkpoint(to: str, **options) -> WriteSample:
    def make(folder: Path, seed: int) -> None:
        convert(RandomModelReader(seed), folder / MODEL, to, WriteOptions(**options))

    return make


def _write_torch_weights(is_zip: bool) -> WriteSample:
    """Writes a Hugging Face folder with pytorch_model.bin, in torch's form of today or before 1.6."""

    def make(folder: Path, seed: int) -> None:
        _write_checkpoint("hf")(folder, seed)
        torch_file_mutators.to_torch_file(folder / MODEL, is_zip)

    return make


def _write_engine(stage: int) -> WriteSample:
    def make(folder: Path, seed: int) -> None:
        _write_checkpoint("deepspeed", extra={"tag": "step_0"})(folder, seed)
        write_engine_files(folder / MODEL / "step_0", stage)

    return make


def _write_torch_dist(folder: Path, seed: int) -> None:
    """Writes a torch_dist checkpoint with optimizer state, as Megatron-core 0.19 does."""
    _write_checkpoint("mcore")(folder, seed)
    torch_dist_mutators.add_optimizer_state(iteration_folders.require_folder(folder / MODEL))


def _write_fairscale(folder: Path, seed: int) -> None:
    """Writes a release as Meta does, without our own records."""
    _write_checkpoint("fairscale", tp=2)(folder, seed)
    for name in ("dims.json", "manifest.json"):
        (folder / MODEL / name).unlink()


def _write_gguf(folder: Path, seed: int) -> None:
    writer = gguf.GGUFWriter(folder / GGUF, "llama")
    for add, value in (
        (writer.add_block_count, MODEL_CONFIG.num_layers), (writer.add_context_length, MODEL_CONFIG.max_positions),
        (writer.add_embedding_length, MODEL_CONFIG.hidden_size),
        (writer.add_feed_forward_length, MODEL_CONFIG.ffn_size),
        (writer.add_head_count, MODEL_CONFIG.num_heads), (writer.add_head_count_kv, MODEL_CONFIG.num_kv_heads),
        (writer.add_key_length, MODEL_CONFIG.head_dim), (writer.add_value_length, MODEL_CONFIG.head_dim),
        (writer.add_rope_dimension_count, MODEL_CONFIG.head_dim), (writer.add_rope_freq_base, MODEL_CONFIG.rope_base),
        (writer.add_layer_norm_rms_eps, MODEL_CONFIG.norm_eps), (writer.add_vocab_size, MODEL_CONFIG.vocab_size),
    ):  # fmt: skip
        add(value)
    _add_gguf_tokenizer(writer)
    source = RandomModelReader(seed)
    for name, item in fused_tensors.stored_tensors(source.arch, MODEL_CONFIG, "gguf").items():
        tensor = source.read(item.keys[0])
        if item.params[0].locations["gguf"].interleaved:
            tensor = fused_tensors.interleave(tensor, MODEL_CONFIG.head_dim)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Adds a sentencepiece tokenizer: three special tokens, letters, and pieces of two."""
    letters = [chr(97 + index) for index in range(24)]
    pieces = [*letters, *(one + other for one, other in zip(letters[1:], letters[:-1], strict=True))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *pieces])
    writer.add_token_scores([float(-index) for index in range(MODEL_CONFIG.vocab_size)])
    writer.add_token_types([2, 3, 3, *[1] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write_run(folder: Path, seed: int) -> None:
    """Writes a training run's checkpoint."""
    path = folder / "checkpoints/step_7"
    convert(RandomModelReader(seed), path, "deepspeed", WriteOptions(extra={"tag": run_checkpoints.ENGINE_TAG}))
    record = {"step": 7, "state": {"losses": {}}, "layout": {"tp": 1, "pp": 1, "dp": 1, "zero": 1}}
    run_checkpoints.write_record(path, None, {}, record)


def read_run(folder: Path) -> object:
    """Reads the state that a run resumes from: the newest checkpoint's record and file contents."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    newest = run_checkpoints.find_newest(folder / "checkpoints")
    assert newest is not None
    names = sorted(path for path in newest.folder.rglob("*.pt"))
    return newest.step, newest.state, [hashlib.sha256(path.read_bytes()).hexdigest() for path in names]


def _write_operator(folder: Path, seed: int) -> None:
    large = replace(MODEL_CONFIG, num_layers=3, hidden_size=24, ffn_size=36, num_heads=8, num_kv_heads=4, head_dim=4)
    operator = InitialOperator(MODEL_CONFIG, large, OperatorSection(noise=0.1, seed=seed))
    operator_file.write_operator(
        operator, ((name, operator.tensor(name)) for name in operator.shapes()), folder / "operator", {}
    )


def read_operator(folder: Path) -> object:
    saved = operator_file.OperatorFile(folder / "operator")
    large, settings = saved.large.to_json(), saved.record["settings"]
    return large, settings, {name: tensor_digest(saved.tensor(name)) for name in saved.shapes()}


def _write_data(folder: Path, seed: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    for _ in range(20):
        ids = draw.integers(0, MODEL_CONFIG.vocab_size, draw.integers(5, 40))
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(folder / "text.idx"))


def read_data(folder: Path) -> object:
    errors = ErrorCollector("data", DataError)
    files = open_indexed_files(str(folder / "text"), errors)
    errors.raise_if_any()
    return files.dtype.__name__, files.documents, files.tokens, files.token_range()


def _write_tokenizer(folder: Path, seed: int) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.train_from_iterator([f"{TEXT} {seed}"] * 20, trainer)
    inner.save(str(folder / "tokenizer.json"))


def read_tokenizer(folder: Path) -> object:
    loaded = load_tokenizer(folder)
    return loaded.encode(TEXT), loaded.vocab_size, loaded.eod


def _write_config(folder: Path, seed: int) -> None:
    (folder / "run.toml").write_text(CONFIG.format(steps=20 + seed))


def read_config(folder: Path) -> object:
    return RunConfig.load(folder / "run.toml").to_dict()


SAMPLES = (
    Sample("hf", _write_checkpoint("hf"), read_checkpoint),
    Sample("hf, sharded", _write_checkpoint("hf", extra={"shard_bytes": 4000}), read_checkpoint),
    Sample("gguf", _write_gguf, read_checkpoint),
    Sample("hf, torch file", _write_torch_weights(True), read_checkpoint),
    Sample("hf, old torch file", _write_torch_weights(False), read_checkpoint),
    Sample("universal", _write_checkpoint("universal"), read_checkpoint),
    Sample("deepspeed", _write_checkpoint("deepspeed", tp=2), read_checkpoint),
    Sample("deepspeed, ZeRO 2", _write_engine(2), read_checkpoint),
    Sample("deepspeed, ZeRO 3", _write_engine(3), read_checkpoint),
    Sample("pipeline", _write_checkpoint("pipeline", tp=2, pp=2), read_checkpoint),
    Sample("torch_dist", _write_checkpoint("mcore"), read_checkpoint),
    Sample("torch_dist with optimizer", _write_torch_dist, read_checkpoint),
    Sample("megatron", _write_checkpoint("megatron", tp=2), read_checkpoint),
    Sample("fairscale", _write_fairscale, read_checkpoint),
    Sample("run", _write_run, read_run),
    Sample("operator", _write_operator, read_operator),
    Sample("data", _write_data, read_data),
    Sample("tokenizer", _write_tokenizer, read_tokenizer),
    Sample("config", _write_config, read_config, any_content=True),
)
