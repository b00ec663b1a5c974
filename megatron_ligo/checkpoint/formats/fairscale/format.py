"""Meta's Llama releases: one file of tensors per rank of fairscale's model parallelism (MP).

    consolidated.00.pth, .01.pth, ...   a flat dict each; linears split by column or row, norms on every rank
    params.json                         sizes (params_json.py)
    tokenizer.model                     copied, from the parent folder if this one has none
    dims.json, manifest.json            this program's (or a Hugging Face config.json): sizes that params.json lacks

The embedding is split along its features by Llama 1 and 2 (ParallelEmbedding) and along the vocabulary by Llama 3
(VocabParallelEmbedding). Rotary pairs are interleaved in wq and wk. Tied models have no tied tensors here:
`output` is written as a copy of the embedding, since Meta's code has a parameter for it, and compared with it when
read. A vocabulary that MP does not divide is padded with zero rows. With fewer KV heads than ranks, each rank has a
copy of one head (read only).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Heads
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, FormatOptions, WriteOptions
from megatron_ligo.checkpoint.formats.fairscale import params_json, tokenizer_model
from megatron_ligo.checkpoint.formats.fairscale.params_json import PARAMS
from megatron_ligo.checkpoint.io import digest, tensor_check, torch_files, tp_shards
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors, tensor_parallel
from megatron_ligo.sharding.fused_tensors import StoredTensor

NAME = "fairscale"
VOCABULARY, FEATURES = "vocabulary", "features"

FILE = "consolidated.{:02d}.pth"
FILES = re.compile(r"consolidated\.(\d+)\.pth")
EMBEDDING, OUTPUT, GATE = "tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight"
# Tensors that every loader recomputes.
NO_WEIGHTS = ("rope.freqs",)


class FairscaleReader(Reader):
    """Reads canonical tensors, joined from the ranks' mapped shards."""

    format = NAME

    def __init__(self, folder: Path, accepted: AcceptedKeys = NO_KEYS):
        self.path = folder
        params = params_json.load_params(folder / PARAMS, accepted)
        self._ranks = _load_ranks(folder)
        if params["n_layers"] > len(self._ranks[0]):
            expected = f"no more than the {len(self._ranks[0])} tensors found"
            raise CheckpointError(Problem(f"{folder / PARAMS}: n_layers", expected, params["n_layers"]))
        self.layout = {"tp": len(self._ranks)}
        self._folder = tempfile.TemporaryDirectory()
        self.files = tokenizer_model.collect_files(folder, Path(self._folder.name))
        record = model_record.find_record(folder, accepted)
        if record:
            self.model_config, self.carried = record
        else:
            self.model_config = self._sizes(params)
            self.carried = tokenizer_model.read_token_ids(self.files)
        self._check(params)

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(self.param(key).shape(self.model_config), self._ranks[0][self._items[key].name].dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        assert kind == WEIGHT, "this format holds no optimizer state"
        item = self._items[key]
        pieces = [rank[item.name] for rank in self._ranks]
        copies = self._copies(item)
        if copies > 1:
            where, starts = f"{key} ({item.name}, {self.path})", range(0, len(pieces), copies)
            pieces = [tp_shards.check_replicas(pieces[at : at + copies], where, at) for at in starts]
        whole = tp_shards.join_shards(item, key, pieces, self._stored, self.model_config, str(self.path))
        if item.name == EMBEDDING and self.model_config.tied and OUTPUT in self._ranks[0]:
            self._check_output(whole)
        return whole

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, rank in enumerate(self._ranks):
            for name, tensor in rank.items():
                yield f"{name} ({FILE.format(number)})", tensor

    def _copies(self, item: StoredTensor) -> int:
        """Returns how many ranks hold a copy of one KV head."""
        kv = item.params[0].axes[0].heads is Heads.KV
        return max(len(self._ranks) // self.model_config.num_kv_heads, 1) if kv else 1

    def _check_output(self, embedding: Tensor) -> None:
        """Compares a tied model's output with its embedding (vocab, hidden)."""
        at = 0
        for rank, piece in enumerate(rank[OUTPUT] for rank in self._ranks):
            part = embedding[at : at + len(piece)]
            if not digest.same_bits(part, piece[: len(part)]):
                where = f"{self.path}: {OUTPUT}, rank {rank}"
                raise CheckpointError(
                    Problem(where, f"the bits of {EMBEDDING}", "other bits", "Is `tied` true by mistake?")
                )
            at += len(piece)

    def _sizes(self, params: Mapping) -> ModelConfig:
        """Returns the sizes of params.json; those that it lacks follow from the tensors' shapes."""
        errors = ErrorCollector(f"{self.path} does not hold the model of its {PARAMS}", CheckpointError)
        first, tp = self._ranks[0], len(self._ranks)
        for name in (EMBEDDING, GATE, *([OUTPUT] if OUTPUT in first else [])):
            if name not in first or first[name].dim() != 2:
                errors.add(name, "a matrix", "none")
        errors.raise_if_any()
        if OUTPUT in first:
            vocab_size = len(first[OUTPUT]) * tp
        else:
            vocab_size = len(first[EMBEDDING]) * (tp if first[EMBEDDING].shape[1] == params["dim"] else 1)
        return params_json.parse_model_config(
            params, len(first[GATE]) * tp, vocab_size, OUTPUT not in first, str(self.path / PARAMS)
        )

    def _check(self, params: Mapping) -> None:
        """Checks the sizes, their split over the ranks, and that each file has its tensors and no others."""
        tp = len(self._ranks)
        errors = ErrorCollector(f"{self.path} does not hold the model of its {PARAMS}", CheckpointError)
        params_json.check_parameters(self.model_config, errors)
        errors.raise_if_any()
        params_json.check_agreement(params, self.model_config, errors)
        shared = self.model_config
        if shared.num_kv_heads < tp and tp % shared.num_kv_heads == 0:
            # Each rank has a copy of one KV head: they are not split.
            shared = replace(shared, num_kv_heads=shared.num_heads)
        tensor_parallel.check_tp(shared, tp, errors)
        self._stored = tp_shards.pad_vocab_size(self.model_config, tp)
        if params.get("vocab_size", -1) not in (-1, self._stored.vocab_size):
            errors.add("vocab_size", f"-1 or {self._stored.vocab_size}, as in the tensors", params["vocab_size"])
        errors.raise_if_any()
        items = _stored_tensors(self.model_config, self._cut())
        if self.model_config.tied and not any(OUTPUT in rank for rank in self._ranks):
            del items[OUTPUT]
        for number, rank in enumerate(self._ranks):
            self._check_rank(FILE.format(number), rank, items, errors)
        errors.raise_if_any(self._tensors)
        self._items: dict[str, StoredTensor] = {}
        for item in items.values():
            for key in item.keys:
                # A tied model's output follows the embedding and has the same key.
                self._items.setdefault(key, item)

    def _cut(self) -> str:
        """Returns the embedding's split, from its shape: whole rows or whole columns on each rank."""
        shape = self._ranks[0][EMBEDDING].shape if EMBEDDING in self._ranks[0] else ()
        return FEATURES if len(self._ranks) > 1 and shape[1:] != (self.model_config.hidden_size,) else VOCABULARY

    def _check_rank(
        self, file: str, rank: Mapping[str, Tensor], items: Mapping[str, StoredTensor], errors: ErrorCollector
    ) -> None:
        for name, item in items.items():
            shape = item.shape(self._stored, len(self._ranks) // self._copies(item))
            if name not in rank:
                errors.add(f"{name} ({file})", f"a tensor of shape {shape}", "nothing")
            elif rank[name].shape != shape:
                errors.add(f"{name} ({file})", f"shape {shape}", tuple(rank[name].shape))
            elif name in self._ranks[0] and rank[name].dtype != self._ranks[0][name].dtype:
                errors.add(f"{name} ({file})", f"{self._ranks[0][name].dtype}, as rank 0", rank[name].dtype)
        for name in sorted(set(rank) - set(items) - set(NO_WEIGHTS)):
            errors.add(f"{name} ({file})", "no such tensor", "one")
        own = {f"{name} ({file})": tensor for name, tensor in rank.items() if name in items}
        tensor_check.check_own_bytes(own, [{f"{name} ({file})" for name in (EMBEDDING, OUTPUT)}], errors)


def _check_layout(model_config: ModelConfig, options: WriteOptions, cut: str) -> None:
    errors = ErrorCollector("the format fairscale cannot be written so", ConfigError)
    if options.pp != 1:
        errors.add("pp", "1: the format has no pipeline parallelism", options.pp)
    tensor_parallel.check_tp(model_config, options.tp, errors)
    if cut == FEATURES and model_config.hidden_size % options.tp:
        errors.add(
            f"tp = {options.tp}", "a divisor of the model's hidden_size", f"hidden_size = {model_config.hidden_size}"
        )
    errors.raise_if_any()


def _stored_tensors(model_config: ModelConfig, cut: str) -> dict[str, StoredTensor]:
    """Returns the tensors of a rank's file: the table's, the embedding split along `cut`, a tied model's output."""
    arch = architectures.get(model_config.arch)
    items = fused_tensors.stored_tensors(arch, model_config, NAME)
    if cut == FEATURES:
        item = items[EMBEDDING]
        items[EMBEDDING] = replace(item, params=(replace(item.params[0], tp_dim=1),))
    for param in arch.params:
        if param.tied_to and model_config.tied:
            name = param.locations[NAME].name
            items[name] = StoredTensor(name, (param.tied_to,), (param,), (param.locations[NAME],))
    return items


def _load_ranks(folder: Path) -> list[dict[str, Tensor]]:
    """Maps each rank's tensors. Raises CheckpointError if a rank's file is missing or holds anything else."""
    numbers = sorted(int(match[1]) for file in folder.iterdir() if (match := FILES.fullmatch(file.name)))
    if numbers != list(range(len(numbers))) or not numbers:
        found = ", ".join(FILE.format(number) for number in numbers) or "none"
        raise CheckpointError(Problem(f"{folder}", f"{FILE.format(0)}, {FILE.format(1)}, ... without a gap", found))
    return [torch_files.load_tensors(folder / FILE.format(number)) for number in numbers]


@dataclass(frozen=True)
class FairscaleOptions(FormatOptions):
    embedding: str = setting(
        VOCABULARY,
        f"cut along the {VOCABULARY} (default: as Llama 3) or the {FEATURES} (as Llama 1 and 2)",
        choices=(VOCABULARY, FEATURES),
    )


class FairscaleFormat(Format):
    name = NAME
    description = f"{PARAMS} beside consolidated.00.pth"
    has_layout = True
    options = FairscaleOptions

    def recognise(self, path: Path) -> bool:
        return (path / PARAMS).is_file() and (path / FILE.format(0)).is_file()

    def open(self, path: Path, accepted: AcceptedKeys) -> FairscaleReader:
        return FairscaleReader(path, accepted)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes params.json and every rank's file, side by side."""
        model_config, tp = source.model_config, options.tp
        cut = self.parse_options(options.extra).embedding
        params_json.check_expressible(model_config)
        _check_layout(model_config, options, cut)
        stored = tp_shards.pad_vocab_size(model_config, tp)
        output.write_json(PARAMS, params_json.to_params_json(model_config, stored.vocab_size, plain=cut == FEATURES))
        model_record.write(source, output)
        pieces, items = tp_shards.TpShards(source, tp, stored), _stored_tensors(model_config, cut)
        output.write_torch_files(
            {
                FILE.format(rank): {name: pieces.lazy_shard(item, rank) for name, item in items.items()}
                for rank in range(tp)
            }
        )  # fmt: skip
