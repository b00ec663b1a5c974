"""The tensors of a GPT-NeoX checkpoint by tensor-parallel rank, from the files of a pipeline or of a plain engine.

    TAG/layer_NN-model_TT-model_states.pt    a layer of the network, of a pipeline (pipe_parallel_size of 1 or more)
    TAG/mp_rank_TT_model_states.pt           all layers of a rank, as `sequential.NN.name` (pipe_parallel_size of 0)

Layer 0 is the embedding. Layer 1 and the one after the last transformer layer hold functions only, and have no file;
then come the final norm and the head, which a tied model has not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from megatron_ligo.checkpoint.formats.deepspeed.engine_rank import read_module_state
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import LAYER_STATES, MODEL_STATES, STAND_INS
from megatron_ligo.checkpoint.formats.neox import settings
from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.common.errors import CheckpointError, ErrorCollector

SEQUENTIAL = re.compile(r"sequential\.(\d+)\.(.+)")
FIRST_LAYER = 2
# Buffers, which hold nothing that was trained.
BUFFERS = ("attention.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
# Names that GPT-NeoX has changed, as they were.
OLD_NAMES = {"mlp.linear1.": "mlp.dense_h_to_4h.", "mlp.linear2.": "mlp.dense_4h_to_h."}


def is_neox(folder: Path) -> bool:
    """Returns whether a folder holds GPT-NeoX's files: a pipeline with its two gaps, or an engine's with settings."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    layers = {int(match["layer"]) for match in map(LAYER_STATES.fullmatch, names) if match}
    if not layers:
        return any(map(MODEL_STATES.fullmatch, names)) and any((folder / settings.FOLDER).glob("*.y*ml"))
    last = max(layers)
    # After the second gap come the norm and, unless it is tied, the head.
    return set(range(last + 1)) - layers in ({1, last - 1}, {1, last - 2})


class LayerFiles:
    """All tensors of a folder. tensors: for each tensor-parallel rank, by Hugging Face's names. state: of rank 0's
    file of the engine, {} without one. Raises CheckpointError with every error of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._errors = ErrorCollector(f"{folder} is not a complete checkpoint of GPT-NeoX", CheckpointError)
        layers, ranks = self._find_files()
        self.state: Mapping[str, object] = self._load(ranks[0]) if 0 in ranks else {}
        states = self._read_layers(layers) if layers else self._read_engines(ranks)
        self._errors.raise_if_any()
        self.num_layers = self._count_layers(states[0])
        self.tensors = [self._rename(state) for state in states]
        self._errors.raise_if_any()

    def _find_files(self) -> tuple[dict[tuple[int, int], Path], dict[int, Path]]:
        """Returns the layers' files by (layer, rank), and the engine's by model-parallel rank."""
        layers, ranks = {}, {}
        for path in sorted(self.folder.iterdir()):
            if match := LAYER_STATES.fullmatch(path.name):
                layers[int(match["layer"]), int(match["tp"] or 0)] = path
            elif (match := MODEL_STATES.fullmatch(path.name)) and match["dp"] is None:
                ranks[int(match["mp"])] = path
        if not layers and not ranks:
            expected = "layer_00-model_00-model_states.pt or mp_rank_00_model_states.pt"
            self._errors.add(f"{self.folder}", expected, "neither")
            self._errors.raise_if_any()
        return layers, ranks

    def _load(self, path: Path) -> dict:
        state = torch_files.load(path, STAND_INS)
        if not isinstance(state, dict):
            self._errors.add(path.name, "a dict", type(state).__name__)
            return {}
        return state

    def _read_layers(self, paths: Mapping[tuple[int, int], Path]) -> list[dict[tuple[int, str], Tensor]]:
        tp = 1 + max(rank for _, rank in paths)
        states: list[dict[tuple[int, str], Tensor]] = [{} for _ in range(tp)]
        for layer in sorted({layer for layer, _ in paths}):
            for rank, state in enumerate(states):
                path = paths.get((layer, rank))
                if path is None:
                    name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                    self._errors.add(name, "a file", "nothing there", "Fetch it again.")
                    continue
                module = read_module_state(self._load(path), path.name, self._errors)
                state.update({(layer, name): tensor for name, tensor in module.items()})
        return states

    def _read_engines(self, paths: Mapping[int, Path]) -> list[dict[tuple[int, str], Tensor]]:
        states = []
        for rank in range(1 + max(paths)):
            if rank not in paths:
                self._errors.add(f"mp_rank_{rank:02d}_model_states.pt", "a file", "nothing there", "Fetch it again.")
                continue
            state = self.state if rank == 0 else self._load(paths[rank])
            module = read_module_state(state.get("module"), paths[rank].name, self._errors)
            matches = {name: SEQUENTIAL.fullmatch(name) for name in module}
            for name in (name for name, match in matches.items() if match is None):
                self._errors.add(f"{name} ({paths[rank].name})", "a name that begins with sequential.N.", "another")
            states.append({(int(match[1]), match[2]): module[name] for name, match in matches.items() if match})
        return states

    def _count_layers(self, state: Mapping[tuple[int, str], Tensor]) -> int:
        """Returns the number of transformer layers: those that have an attention."""
        return len({layer for layer, name in state if name.startswith("attention.")})

    def _rename(self, state: Mapping[tuple[int, str], Tensor]) -> dict[str, Tensor]:
        """Returns a rank's tensors by Hugging Face's names."""
        after = FIRST_LAYER + self.num_layers
        places = {0: ("word_embeddings.", "gpt_neox.embed_in."), after + 1: ("norm.", "gpt_neox.final_layer_norm.")}
        places[after + 2] = ("final_linear.", "embed_out.")
        tensors = {}
        for (layer, name), tensor in state.items():
            for old, new in OLD_NAMES.items():
                name = name.replace(old, new, 1)
            prefix, hf_prefix = places.get(layer, ("", f"gpt_neox.layers.{layer - FIRST_LAYER}."))
            if not name.startswith(prefix) or layer in (1, after) or layer > after + 2:
                self._errors.add(f"{name} (layer {layer})", "a tensor of GPT-NeoX", "another")
            elif not any(fnmatchcase(name, pattern) for pattern in BUFFERS):
                tensors[hf_prefix + name.removeprefix(prefix)] = tensor
        return tensors
