"""GPT-NeoX's own checkpoints (Pythia's and the 20B's trainer), over any tensor- and pipeline-parallel ranks; read only.

    DIR/latest                   the tag
    DIR/TAG/                     layers (layer_files.py)
    DIR/TAG/configs/*.yml        the run's settings (settings.py); or DIR/configs, or config.json beside the layers

Read are the weights as the ranks computed with them; master weights and moments are not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format
from megatron_ligo.checkpoint.formats.deepspeed import state_keys
from megatron_ligo.checkpoint.formats.deepspeed.latest_tag import find_tag_folder
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import LATEST, OPTIM_STATES
from megatron_ligo.checkpoint.formats.deepspeed.reader import find_root
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.neox import settings
from megatron_ligo.checkpoint.formats.neox.layer_files import LayerFiles, is_neox
from megatron_ligo.checkpoint.io import digest, tp_shards
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.fused_tensors import StoredTensor

log = logging.getLogger(__name__)

NAME = "neox"
FAMILY = "gpt_neox"
HF = "hf"
WORDS, UP = "gpt_neox.embed_in.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
# GPT-NeoX pads the vocabulary to a multiple of this times the tensor-parallel ranks.
VOCAB_DIVISOR = 128
HEAD = "embed_out.weight"
# Linears cut along their inputs: a rank adds its own bias before the sum over ranks, if attention and MLP are parallel.
ROW_BIASES = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")


class NeoxReader(Reader):
    """Reads canonical tensors, joined from the tensor-parallel ranks' shards."""

    format = NAME

    def __init__(self, path: Path, accepted: AcceptedKeys):
        self.path = path
        folder = find_tag_folder(path, LATEST)
        root = find_root(path, folder)
        layers = LayerFiles(folder)
        self._ranks = layers.tensors
        self.model_config, self.carried = self._read_config(folder, root, accepted)
        self.files = model_record.find_carried_files(root)
        state_keys.check_state(layers.state, f"{folder}", self.model_config, "the run's settings", accepted)
        self.step = self._read_step(layers.state, folder)
        self._padded_config = replace(self.model_config, vocab_size=self._count_rows(WORDS))
        items = fused_tensors.stored_tensors(self.arch, self.model_config, HF).values()
        self._by_key = {key: item for item in items for key in item.keys}
        self.layout = {"tp": len(self._ranks)}
        if self._padded_config != self.model_config:
            self.layout["padded_vocab"] = self._padded_config.vocab_size
        self._join_head()
        self._check(folder)
        if any(OPTIM_STATES.fullmatch(file.name) for file in folder.iterdir()):
            self.unread = ("fp32 master weights and Adam's state",)
        self._reported: set[str] = set()

    def info(self, key: str) -> TensorInfo:
        tensor = self._ranks[0][self._by_key[key].name]
        return TensorInfo(self.param(key).shape(self.model_config), tensor.dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        assert kind == WEIGHT, "this format's optimizer state is not read"
        item = self._by_key[key]
        pieces = [rank[item.name] for rank in self._ranks]
        if len(pieces) > 1 and item.tp_dim is None:
            pieces = [self._join_copies(item, pieces)]
        if item.name == HEAD and self._is_joined_head:
            pieces = pieces[:1]
        return tp_shards.join_shards(item, key, pieces, self._padded_config, self.model_config, NAME)

    def _join_copies(self, item: StoredTensor, pieces: Sequence[Tensor]) -> Tensor:
        """Returns what the ranks' copies of a vector amount to, in their dtype.

        Biases that each rank adds before the sum over ranks: their sum. Others are equal, or (norms of a parallel
        layer, which early versions trained apart) their mean, as GPT-NeoX's own converter has it.
        """
        if self.model_config.parallel_residual and item.name.endswith(ROW_BIASES):
            return torch.stack([piece.float() for piece in pieces]).sum(0).to(pieces[0].dtype)
        if not self.model_config.parallel_residual:
            return tp_shards.check_replicas(pieces, f"{item.name} ({NAME})")
        if all(digest.same_bits(pieces[0], piece) for piece in pieces[1:]):
            return pieces[0]
        copies = torch.stack([piece.float() for piece in pieces])
        if item.name not in self._reported:
            self._reported.add(item.name)
            spread = float((copies - copies.mean(0)).abs().max())
            log.warning("%s: the ranks' copies differ by %.2g: their mean is read.", item.name, spread)
        return copies.mean(0).to(pieces[0].dtype)

    def _read_config(
        self, folder: Path, root: Path, accepted: AcceptedKeys
    ) -> tuple[ModelConfig, Mapping[str, object]]:
        """Returns the config of config.json or dims.json, else of the run's settings, and what is carried of it."""
        stated, run_config = settings.read_settings(folder), None
        vocab_size, ffn_size = (self._count_rows(name) for name in (WORDS, UP))
        if stated is not None:
            config = stated.to_hf_config(vocab_size, ffn_size, accepted)
            run_config = config_json.parse_model_config(config, stated.where)
        if not model_record.has_record(root):
            if run_config is not None:
                return run_config, {}
            hint = "Copy the run's .yml files there, or put the model's Hugging Face config.json beside the layers."
            where = f"{folder / settings.FOLDER}"
            raise CheckpointError(Problem(where, "the run's settings", "none", hint))
        model_config, carried = model_record.read(root, accepted)
        errors = ErrorCollector(f"the config in {root} describes another model than {folder}", CheckpointError)
        if model_config.model_type != FAMILY:
            errors.add("model_type", FAMILY, model_config.model_type)
        elif run_config is not None:
            settings.check_config(run_config, model_config, stated.where, f"the config in {root}", errors)
        if not model_config.vocab_size <= vocab_size < model_config.vocab_size + VOCAB_DIVISOR * len(self._ranks):
            errors.add("vocab_size", f"{vocab_size}, the rows of {WORDS}, or a little less", model_config.vocab_size)
        errors.raise_if_any()
        return model_config, carried

    def _count_rows(self, name: str) -> int:
        """Returns the rows of a tensor that is cut along them, over all ranks; 0 without one."""
        return self._ranks[0][name].shape[0] * len(self._ranks) if name in self._ranks[0] else 0

    def _read_step(self, state: Mapping[str, object], folder: Path) -> int:
        step = state.get("global_steps", 0)
        if type(step) is not int or step < 0:
            raise CheckpointError(Problem(f"{folder}: global_steps", "a non-negative integer", repr(step)))
        return step

    def _join_head(self) -> None:
        """Joins a head that is cut along its inputs (output_layer_parallelism of "row"), as its shape tells."""
        pieces, config = [rank.get(HEAD) for rank in self._ranks], self.model_config
        cut = (self._padded_config.vocab_size, config.hidden_size // len(pieces))
        self._is_joined_head = len(pieces) > 1 and all(piece is not None and piece.shape == cut for piece in pieces)
        if self._is_joined_head:
            self._ranks[0][HEAD] = torch.cat(pieces, dim=1)

    def _check(self, folder: Path) -> None:
        """Raises CheckpointError unless every rank has every tensor in its shape, and no others."""
        errors = ErrorCollector(f"{folder} does not hold the model of its settings", CheckpointError)
        if self.model_config.num_layers > len(self._ranks[0]):
            errors.add("num_layers", f"at most {len(self._ranks[0])}, from the tensors", self.model_config.num_layers)
            errors.raise_if_any()
        expected = {item.name: item for item in self._by_key.values()}
        for number, rank in enumerate(self._ranks):
            for name, item in expected.items():
                is_whole = name == HEAD and self._is_joined_head
                if is_whole and number:
                    continue
                shape = item.shape(self._padded_config, 1 if is_whole else len(self._ranks))
                tensor = rank.get(name)
                if tensor is None or tuple(tensor.shape) != shape:
                    actual = "nothing" if tensor is None else tuple(tensor.shape)
                    errors.add(f"{name} (rank {number})", f"shape {shape}", actual)
                elif not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
                    errors.add(f"{name} (rank {number})", "a floating-point dtype of 16 bits or more", tensor.dtype)
            for name in sorted(set(rank) - set(expected)):
                errors.add(f"{name} (rank {number})", "no such tensor", f"shape {tuple(rank[name].shape)}")
        errors.raise_if_any(self._iter_tensors)

    def _iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, rank in enumerate(self._ranks):
            yield from ((f"{name} (rank {number})", tensor) for name, tensor in rank.items())


class NeoxFormat(Format):
    name = NAME
    description = (
        f"{LATEST} (or the folder that it names) with GPT-NeoX's layers and configs/*.yml of its run, or config.json"
    )
    writable = False

    def recognise(self, path: Path) -> bool:
        try:
            return is_neox(find_tag_folder(path, LATEST))
        except CheckpointError:
            return False

    def open(self, path: Path, accepted: AcceptedKeys) -> NeoxReader:
        return NeoxReader(path, accepted)
