"""DeepSpeed pipeline checkpoints: a file for each layer and tensor-parallel rank, whatever the number of stages.

    DIR/latest                                                 the tag
    DIR/TAG/layer_NN-model_TT-model_states.pt                  the layer's own names
    DIR/TAG/mp_rank_MM_model_states.pt                         counts only; MM runs over stages x tensor-parallel ranks
    DIR/TAG/[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt   read, where they are: masters and moments (ZeRO 1)
    DIR/dims.json or config.json                               the model's sizes; DeepSpeed does not look at them

Layer 0 is the words' embedding, whatever is added to it is a layer of its own (an image's embedding is one layer), then
come the transformer's layers, the final norm (a masked-LM model: the transform of its head), the head and its bias. A
tied head is stored nowhere: DeepSpeed copies the embedding to it. Written are layers and counts, which a pipeline of
that tensor parallelism loads with `load_checkpoint(DIR, load_module_only=True)` at any number of stages.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from torch import Tensor

from megatron_ligo import arch
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.deepspeed.engine import counts
from megatron_ligo.checkpoint.formats.deepspeed.latest_tag import TagOptions, find_tag_folder
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import (
    LATEST,
    EngineFiles,
    has_layer_states,
    layer_states_file,
    model_states_file,
)
from megatron_ligo.checkpoint.formats.deepspeed.reader import (
    EngineRank,
    EngineReader,
    find_root,
    read_module_state,
    read_param_shapes,
)
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import ZeroOptimizerState
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.io.tp_shards import TpShards, pad_vocab_size
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.pipeline_layers import layer_prefixes
from megatron_ligo.sharding.tensor_parallel import check_tp

NAME = "pipeline"


def _held(model_config: ModelConfig) -> dict[int, dict[str, fused_tensors.StoredTensor]]:
    """By layer of the pipeline that has a file: its tensors by the names that they have there."""
    stored = fused_tensors.stored_tensors(arch.get(model_config.arch), model_config, "mcore")
    held: dict[int, dict[str, fused_tensors.StoredTensor]] = {}
    for layer, names in enumerate(layer_prefixes(model_config)):
        for own, whole in names.items():
            mine = {own + name.removeprefix(whole): item for name, item in stored.items() if name.startswith(whole)}
            held.setdefault(layer, {}).update(mine)
    return {layer: names for layer, names in held.items() if names}


def _ranks_of_layers(saved: EngineFiles, model_config: ModelConfig) -> int:
    """How many tensor-parallel ranks the layers have; every layer is there on each."""
    errors = ErrorCollector(f"{saved.tag_folder} is no whole checkpoint of a DeepSpeed pipeline", CheckpointError)
    tp = 1 + max((rank for _, rank in saved.layer_states), default=0)
    expected = _held(model_config)
    found = {layer for layer, _ in saved.layer_states}
    if found - expected.keys():
        means = f"numbers up to {max(expected)}: those of the ends and {model_config.num_layers} of the transformer's"
        errors.add("layers of the pipeline", means, f"number {max(found)}")
    if saved.mp_world_size % tp:
        hint = "Are files of two checkpoints mixed?"
        errors.add("model-parallel ranks", f"a multiple of the layers' {tp} ranks", saved.mp_world_size, hint)
    places = ((layer, rank) for layer in expected for rank in range(tp))
    for layer, rank in islice((place for place in places if place not in saved.layer_states), 20):
        errors.add(layer_states_file(layer, rank), "a file", "nothing there")
    errors.raise_if_any()
    return tp


def _rank(saved: EngineFiles, rank: int, tp: int, model_config: ModelConfig, errors: ErrorCollector) -> EngineRank:
    weights: dict[str, Tensor] = {}
    names = layer_prefixes(model_config)
    for layer in _held(model_config):
        where = layer_states_file(layer, rank)
        for name, tensor in read_module_state(saved.layer_states[layer, rank], where, errors).items():
            own = next((own for own in names[layer] if name.startswith(own)), None)
            if own is None:
                errors.add(f"{name} ({where})", f"a name that begins with {' or '.join(names[layer])}", "another")
            else:
                weights[names[layer][own] + name.removeprefix(own)] = tensor
    masters, trained = [], set()
    for mp in range(rank, saved.mp_world_size, tp):
        where = f"mp_rank_{mp:02d}"
        groups = read_param_shapes(saved.model_states[mp], where, errors)
        trained |= {name for group in groups for name in group}
        if saved.optim_states[mp]:
            masters.append(ZeroOptimizerState(saved.optim_states[mp], groups, where, errors))
    return EngineRank(weights, {name: tuple(tensor.shape) for name, tensor in weights.items()}, trained, masters)


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
            return has_layer_states(find_tag_folder(path, LATEST))
        except CheckpointError:
            return False

    def open(self, path: Path) -> Reader:
        tag = find_tag_folder(path, LATEST)
        saved = EngineFiles(tag)
        root = find_root(path, tag)
        model_config, _ = model_record.read(root)
        tp = _ranks_of_layers(saved, model_config)
        errors = ErrorCollector(f"{tag} does not hold the model of its sizes", CheckpointError)
        held = [_rank(saved, rank, tp, model_config, errors) for rank in range(tp)]
        return EngineReader(NAME, path, root, saved, held, errors)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Layers and counts; the files of the tensor-parallel ranks side by side."""
        errors = ErrorCollector("a DeepSpeed pipeline cannot hold the model so", ConfigError)
        check_tp(source.model_config, options.tp, errors)
        if options.pp > source.model_config.num_layers:
            errors.add(f"pp = {options.pp}", "at most a stage a layer", f"{source.model_config.num_layers} layers")
        layers = _held(source.model_config)
        known = {item.name for names in layers.values() for item in names.values()}
        for name in fused_tensors.stored_tensors(source.arch, source.model_config, "mcore").keys() - known:
            errors.add(name, "a tensor of the embedding, a layer or the head", "another")
        errors.raise_if_any()
        model_record.write(source, output)
        pieces = TpShards(source, options.tp, pad_vocab_size(source.model_config, options.tp))
        tag = self.parse_options(options.extra).folder(source.step)
        for layer, names in layers.items():
            output.write_torch_files(
                {
                    f"{tag}/{layer_states_file(layer, rank)}": {
                        own: pieces.lazy_shard(item, rank) for own, item in names.items()
                    }
                    for rank in range(options.tp)
                }
            )
        ranks = options.tp * options.pp
        for rank in range(ranks):
            output.write_torch(f"{tag}/{model_states_file(rank)}", {"module": None, **counts(ranks, source.step)})
        # Last: DeepSpeed takes a folder without it for none.
        output.write_text(LATEST, tag)
