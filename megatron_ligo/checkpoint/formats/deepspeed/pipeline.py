"""DeepSpeed pipeline checkpoints: one file per pipeline layer and tensor-parallel rank, at any number of stages.

    DIR/latest                                                 the tag
    DIR/TAG/layer_NN-model_TT-model_states.pt                  parameters by the layer module's own names
    DIR/TAG/mp_rank_MM_model_states.pt                         counters only; MM over stages x tensor-parallel ranks
    DIR/TAG/[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt   read only, if saved: masters and moments (ZeRO 1)
    DIR/dims.json or config.json                               the model's config, which DeepSpeed does not read

Layer 0 is the word embedding; other embeddings are a layer of their own (an image's embeddings are one layer). Then
come the transformer layers, the final norm (of a masked LM, the head's transform), the head and its bias. A tied head
is not stored: DeepSpeed copies the embedding to it. The writer stores layers and counters. A pipeline at the same
tensor parallelism and any number of stages loads them with `load_checkpoint(DIR, load_module_only=True)`.
Megatron-DeepSpeed's layers are read too (megatron_layers.py).
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from torch import Tensor

from megatron_ligo import arch
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.deepspeed import megatron_layers
from megatron_ligo.checkpoint.formats.deepspeed.engine import build_run_counters
from megatron_ligo.checkpoint.formats.deepspeed.engine_rank import EngineRank, read_module_state, read_param_shapes
from megatron_ligo.checkpoint.formats.deepspeed.latest_tag import TagOptions, find_tag_folder
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import (
    LATEST,
    EngineFiles,
    has_layer_states,
    layer_states_file,
    model_states_file,
)
from megatron_ligo.checkpoint.formats.deepspeed.reader import EngineReader, find_root
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import ZeroOptimizerState
from megatron_ligo.checkpoint.formats.neox.layer_files import is_neox
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.io.tp_shards import TpShards, pad_vocab_size
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.fused_tensors import StoredTensor
from megatron_ligo.sharding.pipeline_layers import layer_prefixes
from megatron_ligo.sharding.tensor_parallel import check_tp

NAME = "pipeline"
MAX_LISTED_FILES = 20


def _layer_tensors(model_config: ModelConfig) -> dict[int, dict[str, StoredTensor]]:
    """Returns the tensors of each pipeline layer that has a file, by their names in it."""
    stored_tensors = fused_tensors.stored_tensors(arch.get(model_config.arch), model_config, "mcore")
    layers: dict[int, dict[str, StoredTensor]] = {}
    for layer, prefixes in enumerate(layer_prefixes(model_config)):
        for layer_prefix, model_prefix in prefixes.items():
            tensors = {
                layer_prefix + name.removeprefix(model_prefix): stored
                for name, stored in stored_tensors.items()
                if name.startswith(model_prefix)
            }
            layers.setdefault(layer, {}).update(tensors)
    return {layer: tensors for layer, tensors in layers.items() if tensors}


def _read_tp_size(files: EngineFiles, model_config: ModelConfig) -> int:
    """Returns the tensor parallelism of the layer files, and checks that every rank has every layer."""
    title = f"{files.tag_folder} is not a complete checkpoint of a DeepSpeed pipeline"
    errors = ErrorCollector(title, CheckpointError)
    tp = 1 + max((rank for _, rank in files.layer_states), default=0)
    expected_layers = _layer_tensors(model_config)
    layers = {layer for layer, _ in files.layer_states}
    if layers - expected_layers.keys():
        expected = f"numbers up to {max(expected_layers)}, {model_config.num_layers} of them transformer layers"
        errors.add("layers of the pipeline", expected, f"number {max(layers)}")
    if files.mp_world_size % tp:
        hint = "Are files of two checkpoints mixed?"
        errors.add("model-parallel ranks", f"a multiple of the layers' {tp} ranks", files.mp_world_size, hint)
    expected_files = ((layer, rank) for layer in expected_layers for rank in range(tp))
    missing = (file for file in expected_files if file not in files.layer_states)
    for layer, rank in islice(missing, MAX_LISTED_FILES):
        errors.add(layer_states_file(layer, rank), "a file", "nothing there")
    errors.raise_if_any()
    return tp


def _read_rank(
    files: EngineFiles, tp_rank: int, tp: int, model_config: ModelConfig, errors: ErrorCollector
) -> EngineRank:
    """Reads a tensor-parallel rank's layers, by the model's names, and the optimizer states of all stages."""
    module_state: dict[str, Tensor] = {}
    prefixes = layer_prefixes(model_config)
    for layer in _layer_tensors(model_config):
        where = layer_states_file(layer, tp_rank)
        for name, tensor in read_module_state(files.layer_states[layer, tp_rank], where, errors).items():
            layer_prefix = next((prefix for prefix in prefixes[layer] if name.startswith(prefix)), None)
            if layer_prefix is None:
                errors.add(f"{name} ({where})", f"a name that begins with {' or '.join(prefixes[layer])}", "another")
            else:
                module_state[prefixes[layer][layer_prefix] + name.removeprefix(layer_prefix)] = tensor
    optimizer_states, trained = [], set()
    for mp_rank in range(tp_rank, files.mp_world_size, tp):
        where = f"mp_rank_{mp_rank:02d}"
        param_shapes = read_param_shapes(files.model_states[mp_rank], where, errors)
        trained |= {name for shapes in param_shapes for name in shapes}
        if files.optim_states[mp_rank]:
            optimizer_states.append(ZeroOptimizerState(files.optim_states[mp_rank], param_shapes, where, errors))
    shapes = {name: tuple(tensor.shape) for name, tensor in module_state.items()}
    return EngineRank(module_state, shapes, trained, optimizer_states)


class PipelineFormat(Format):
    name = NAME
    description = (
        f"{LATEST} (or the folder that it names) with layer_00-model_00-model_states.pt and the like "
        "(DeepSpeed pipeline)"
    )
    has_layout = True
    options = TagOptions

    def recognise(self, path: Path) -> bool:
        try:
            tag_folder = find_tag_folder(path, LATEST)
            return has_layer_states(tag_folder) and not is_neox(tag_folder)
        except CheckpointError:
            return False

    def open(self, path: Path, accepted: AcceptedKeys) -> Reader:
        tag_folder = find_tag_folder(path, LATEST)
        files = EngineFiles(tag_folder)
        root = find_root(path, tag_folder)
        model_config, _ = model_record.read(root, accepted)
        errors = ErrorCollector(f"{tag_folder} does not hold the model of its config", CheckpointError)
        if megatron_layers.has_megatron_layers(files):
            tp = 1 + max(rank for _, rank in files.layer_states)
            ranks = [megatron_layers.read_rank(files, tp_rank, errors) for tp_rank in range(tp)]
            errors.raise_if_any()
            reader = EngineReader(NAME, path, root, files, ranks, accepted, errors)
            if files.optim_states[0]:
                reader.unread = ("fp32 master weights and Adam's state, of Megatron-DeepSpeed's pipeline",)
            return reader
        tp = _read_tp_size(files, model_config)
        ranks = [_read_rank(files, tp_rank, tp, model_config, errors) for tp_rank in range(tp)]
        return EngineReader(NAME, path, root, files, ranks, accepted, errors)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes layers, each with the files of all tensor-parallel ranks side by side, then the counters."""
        model_config = source.model_config
        errors = ErrorCollector("a DeepSpeed pipeline cannot hold the model at this layout", ConfigError)
        check_tp(model_config, options.tp, errors)
        if options.pp > model_config.num_layers:
            errors.add(f"pp = {options.pp}", "at most one stage per layer", f"{model_config.num_layers} layers")
        layers = _layer_tensors(model_config)
        placed = {stored.name for tensors in layers.values() for stored in tensors.values()}
        for name in fused_tensors.stored_tensors(source.arch, model_config, "mcore").keys() - placed:
            errors.add(name, "a tensor of the embedding, a layer or the head", "another")
        errors.raise_if_any()
        model_record.write(source, output)
        shards = TpShards(source, options.tp, pad_vocab_size(model_config, options.tp))
        tag = self.parse_options(options.extra).folder(source.step)
        for layer, tensors in layers.items():
            output.write_torch_files(
                {
                    f"{tag}/{layer_states_file(layer, rank)}": {
                        name: shards.lazy_shard(stored, rank) for name, stored in tensors.items()
                    }
                    for rank in range(options.tp)
                }
            )
        num_ranks = options.tp * options.pp
        for rank in range(num_ranks):
            state = {"module": None, **build_run_counters(num_ranks, source.step)}
            output.write_torch(f"{tag}/{model_states_file(rank)}", state)
        # Written last: without it, DeepSpeed sees no checkpoint.
        output.write_text(LATEST, tag)
