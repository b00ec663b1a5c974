"""Small valid files of runs and their inputs: records, hand-offs, caches, tokenizers, texts, images, settings."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.common.errors import CheckpointError, ErrorCollector
from megatron_ligo.common.file_digest import digest_file
from megatron_ligo.config.run_config import SCRATCH, DataSection, ParallelSection, RunConfig
from megatron_ligo.config.run_identity import run_identity
from megatron_ligo.data.corpus.raw_chunks import parse_chunk
from megatron_ligo.data.corpus.text_files import read_file, select_text_files
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.image_dataset import open_image_dataset
from megatron_ligo.data.prepare_images import prepare_images
from megatron_ligo.data.prepare_text import TextRecipe, prepare_text
from megatron_ligo.data.text_dataset import open_text_dataset
from megatron_ligo.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_ligo.distributed.digest_cache import WHOLE, DigestCache
from megatron_ligo.experiments.compare.comparison_config import load_comparison
from megatron_ligo.experiments.staged_growth import load_stages
from megatron_ligo.export import chain, handoff, run_inputs
from megatron_ligo.export.pretrain_record import read_pretrain_record, write_pretrain_record
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.report.run_records import read_runs
from megatron_ligo.testing.fuzz.sample_files import MODEL_CONFIG, TEXT, RandomModelReader, Sample, tensor_digest
from megatron_ligo.training import deepspeed_profile
from megatron_ligo.training.checkpointing import run_checkpoints
from megatron_ligo.training.guard import stop_record
from megatron_ligo.training.initial_weights import open_start

WORDS = ("good", "files", "are", "read", "as", "they", "stand", "and", "others", "refused")
SEQ_LENGTH, SAMPLES_READ = 8, 6
# The bytes, sentencepiece's own tokens and some pieces.
VOCAB = 300
IMAGE_CONFIG = ModelConfig(
    arch="vit", model_type="vit", num_layers=1, hidden_size=8, ffn_size=8, num_heads=2, num_kv_heads=2, head_dim=4,
    vocab_size=4, max_positions=5, norm_eps=1e-6, image_size=4, patch_size=2, num_channels=1,
)  # fmt: skip
COMPARISON = """
[small]
path = "a"
[large]
num_layers = 3
[pretrain]
steps = {steps}
[data]
train = ["b"]
valid = ["c"]
[compare]
seeds = [1, 2]
lrs = [1e-3]
[arms.start]
operator = {{method = "lossless"}}
[arms.fitted]
operator = {{method = "lossless"}}
fit = {{steps = 3}}
"""
STAGES = """
[shared.data]
train = ["b"]
[[stages]]
name = "one"
[stages.small]
path = "a"
[stages.pretrain]
steps = {steps}
[[stages]]
name = "two"
launcher = ["deepspeed"]
[stages.large]
num_layers = 4
[stages.pretrain]
steps = 2
"""


def _join_one_process() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _documents(seed: int, count: int = 24) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(4, 30))) for _ in range(count)]


def _write_runs(folder: Path, seed: int) -> None:
    """Writes the small model and runs/: a fit's operator, the model grown by it, and its pretraining."""
    convert(RandomModelReader(seed), folder / "small", "hf", WriteOptions())
    small = handoff.formats.open(folder / "small")
    sizes = {"large": {"num_layers": 3, "ffn_size": 36}, "small": {"path": str(folder / "small")}}
    config = RunConfig.from_dict({**sizes, "operator": {"seed": seed}})
    operator = build_initial_operator(small.model_config, config.large, config.operator)
    digest = handoff.digest_weights(small, DigestCache())
    inputs = {"small model: weights": {"path": "small", "kind": run_inputs.WEIGHTS, "digest": digest}}
    losses = {"start": 2.0, "end": 1.5 + seed}
    fitted = {
        "source": {"digest": digest}, run_inputs.INPUTS: inputs, "losses": losses,
        "eval": {"samples": 2, "digest": "0" * 32}, "config": config.to_dict(), "layout": {"tp": 1},
    }  # fmt: skip
    tensors = ((name, operator.tensor(name)) for name in operator.shapes())
    operator_file.write_operator(operator, tensors, folder / "runs/fit/operator", fitted)
    handoff.grow_from_config(config, folder / "runs/fit/operator", folder / "runs/grown")
    _write_pretraining(folder / "runs/pretrain", RunConfig.from_dict({**sizes, "pretrain": {"start": "grown"}}), losses)


def _write_pretraining(run: Path, config: RunConfig, losses: dict) -> None:
    record = {
        "run": run_identity(config, "pretrain", ()), "dims": MODEL_CONFIG.to_json(), "grown": True, "step": 7,
        "losses": losses, "eval": {"samples": 2, "digest": "0" * 32}, run_inputs.INPUTS: {},
        "layout": {"tp": 1, "pp": 1, "dp": 1, "zero": 1}, "peak_memory_bytes": [1 << 20], "versions": {},
    }  # fmt: skip
    write_pretrain_record(run, record)
    model_record.write_folder(run / chain.MODEL_FOLDER, MODEL_CONFIG, {}, ())
    checkpoint = run / "checkpoints/step_7"
    convert(RandomModelReader(7), checkpoint, "deepspeed", WriteOptions(extra={"tag": run_checkpoints.ENGINE_TAG}))
    state = {"losses": losses, run_inputs.INPUTS: {}}
    run_checkpoints.write_record(
        checkpoint, run / chain.MODEL_FOLDER, {}, {"step": 7, "state": state, "layout": record["layout"]}
    )


def read_chain(folder: Path) -> object:
    """Walks the runs; CheckpointError with what is not as recorded. Opens the hand-off as a pretraining does."""
    report = chain.verify_runs(folder / "runs", DigestCache(recompute=True))
    errors = ErrorCollector("the chain", CheckpointError)
    errors.problems += report.problems
    errors.raise_if_any()
    start = open_start(folder / "runs/grown")
    record = read_pretrain_record(folder / "runs/pretrain")
    weights = {key: tensor_digest(start.source.read(key)) for key in sorted(start.source.keys())}
    return len(report.checked), report.notes, start.origin, start.fit_record, record, weights


def _write_report(folder: Path, seed: int) -> None:
    config = RunConfig.from_dict({"small": {"path": "a"}, "pretrain": {"start": SCRATCH}})
    _write_pretraining(folder / "run", config, {"start": 3.0, "end": 2.0})
    rows = [
        {
            "step": step, "loss": 3.0 / step + seed, "lr": 1e-3, "tokens": 8 * step, "flops": 1e6 * step,
            "seconds": 0.5 * step, "grad_norm": None if step == 3 else 1.0,
        } | ({"anomaly": "a spike", "skipped": 1} if step == 3 else {})
        for step in range(1, 8)
    ]  # fmt: skip
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stop_record.write_stop(folder / "run", 3, "a spike")
    shutil.rmtree(folder / "run/checkpoints")


def read_report(folder: Path) -> object:
    """Reads a run as the report and a restart do."""
    (run,) = read_runs([folder / "run"])
    stops = stop_record.read_stops(folder / "run")
    return run.metrics, run.losses, run.notes, run.layout, run.parameters, [asdict(stop) for stop in stops]


def _write_prepared(folder: Path, seed: int) -> None:
    """Prepares text with a trained tokenizer and opens it once, so that its sample indices are there."""
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in _documents(seed, 60)))
    prepare_text(TextRecipe(DocumentSource((source,)), train_vocab=VOCAB), folder / "data", 1)
    source.unlink()
    read_prepared(folder)


def read_prepared(folder: Path) -> object:
    """Reads samples by the sample indices in cache/."""
    _join_one_process()
    data, tokenizer = folder / "data", load_tokenizer(folder / "data/tokenizer")
    section = DataSection(train=(f"{data}/train",), valid=(f"{data}/valid",), tokenizer=f"{data}/tokenizer")
    text = open_text_dataset(section, SEQ_LENGTH, SAMPLES_READ, 1, 5, folder / "cache")
    text.check_vocab(tokenizer.vocab_size)
    batches = [text.train_batch(step, 2, 2, 1, 0)[0]["tokens"] for step in range(SAMPLES_READ // 2)]
    return tensor_digest(*batches), tokenizer.decode(batches[0][0].tolist())


def _write_digests(folder: Path, seed: int) -> None:
    (folder / "a.bin").write_text(f"{seed}")
    record = {"stamps": [["a.bin", 1, 2, 3, 4]], "digests": {WHOLE: "0" * 32}}
    (folder / ".a.bin.digest").write_text(json.dumps(record))
    (folder / "b.bin").write_bytes(bytes(100))


def read_digests(folder: Path) -> object:
    """Returns the kept or new digest of each file: that of its content, whatever is kept."""
    paths = [path for path in sorted(folder.glob("*.bin")) if path.is_file()]
    digests = DigestCache().digest_files(dict.fromkeys(paths, WHOLE))
    assert digests == {path: digest_file(path) for path in paths}
    return list(digests.values())


def _write_sentencepiece(folder: Path, seed: int) -> None:
    train_sentencepiece(iter(_documents(seed, 60)), VOCAB, folder)


def _write_word_pieces(folder: Path, seed: int) -> None:
    letters = [chr(97 + index) for index in range(26)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join([*pieces, f"good{'s' * seed}", "files"]) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_merges(folder: Path, seed: int) -> None:
    import tokenizers

    names = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "go", "od", "go" + "od"[seed:]]
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    merges = ["#version: 0.2", "g o", "o d", "go od" if not seed else "go d"]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def read_tokenizer_folder(folder: Path) -> object:
    """Encodes a text with the tokenizer in a folder."""
    loaded = load_tokenizer(folder)
    return loaded.encode(TEXT.lower()), loaded.vocab_size, loaded.eod, loaded.digest


def _write_texts(folder: Path, seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    texts = _documents(seed, 8)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.txt").write_text("\n\n".join(texts))
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in texts]))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    with pa.CompressedOutputStream(str(folder / "e.txt.zst"), "zstd") as file:
        file.write("\n\n".join(texts).encode())
    table = pa.table({"text": texts})
    pyarrow.parquet.write_table(table, folder / "f.parquet")
    with pa.OSFile(str(folder / "g.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def read_texts(folder: Path) -> object:
    """Reads the documents of every file as prepare_data does, without encoding them."""
    selection = select_text_files([f"{folder}"])
    documents = [(path.name, *_read_documents(path)) for path in selection.files]
    return documents, [note.replace(f"{folder}", "") for note in selection.notes]


def _read_documents(path: Path) -> tuple[Sequence[str], int]:
    chunks = [parse_chunk(chunk, "text") for chunk in islice(read_file(path, "text", None), 1000)]
    return [text for chunk in chunks for text in chunk.texts], sum(len(chunk.problems) for chunk in chunks)


def _write_images(folder: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (24, 1, 4, 4)).astype(np.uint8)
    prepare_images(images, draw.integers(0, 4, 24), folder, 0.3)


def read_images(folder: Path) -> object:
    """Reads the first images and labels."""
    _join_one_process()
    section = DataSection(train=(f"{folder}/train.safetensors",), valid=(f"{folder}/valid.safetensors",))
    images = open_image_dataset(replace(section, pixel_mean=(0.5,), pixel_std=(0.5,)), IMAGE_CONFIG, 1)
    batch = images.train_batch(0, 4, 4, 1, 0)[0]
    return tensor_digest(batch["tokens"], batch["labels"])


def _write_comparison(folder: Path, seed: int) -> None:
    (folder / "compare.toml").write_text(COMPARISON.format(steps=20 + seed))


def read_comparison(folder: Path) -> object:
    return load_comparison(folder / "compare.toml").to_dict()


def _write_stages(folder: Path, seed: int) -> None:
    (folder / "stages.toml").write_text(STAGES.format(steps=20 + seed))


def read_stages(folder: Path) -> object:
    stages = load_stages(folder / "stages.toml", Path("runs/stages"))
    return [(stage.name, stage.launcher, stage.config.to_dict()) for stage in stages]


def _write_profile(folder: Path, seed: int) -> None:
    profile = json.loads((deepspeed_profile.PROFILE_FOLDER / "zero2.json").read_text())
    (folder / "zero.json").write_text(json.dumps({**profile, "wall_clock_breakdown": bool(seed)}))


def read_profile(folder: Path) -> object:
    return deepspeed_profile.read_profile(ParallelSection(zero=2, ds_config=f"{folder}/zero.json"))


RUN_SAMPLES = (
    Sample("chain of runs", _write_runs, read_chain),
    Sample("report", _write_report, read_report, any_content=True),
    Sample("prepared data", _write_prepared, read_prepared),
    Sample("kept digests", _write_digests, read_digests, any_content=True),
    Sample("tokenizer.model", _write_sentencepiece, read_tokenizer_folder, any_content=True),
    Sample("vocab.txt", _write_word_pieces, read_tokenizer_folder, any_content=True),
    Sample("vocab.json", _write_merges, read_tokenizer_folder, any_content=True),
    Sample("texts", _write_texts, read_texts, any_content=True),
    Sample("images", _write_images, read_images, any_content=True),
    Sample("comparison", _write_comparison, read_comparison, any_content=True),
    Sample("stages", _write_stages, read_stages, any_content=True),
    Sample("DeepSpeed profile", _write_profile, read_profile, any_content=True),
)
