"""DeepSpeed engine checkpoints: a file of module states for each tensor-parallel rank, and ZeRO's optimizer states.

    DIR/latest                                                 the tag
    DIR/TAG/mp_rank_TT_model_states.pt
    DIR/TAG/[bf16_]zero_pp_rank_D_mp_rank_TT_optim_states.pt   read: any ZeRO stage, fp32, bf16 and fp16
    DIR/dims.json or config.json                               the model's sizes; DeepSpeed does not look at them

Names are Megatron-core's; a model of transformers in an engine is read by its own. Written are module states, which an
engine of that tensor parallelism loads with `load_checkpoint(DIR, load_module_only=True)` at ZeRO 0, 1 and 2 (ZeRO 3
asks for files of its own layout: give it a universal checkpoint).
"""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.deepspeed.latest_tag import TagOptions, find_tag_folder
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import (
    LATEST,
    EngineFiles,
    has_layer_states,
    has_model_states,
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
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.tensor_parallel import check_tp

NAME = "deepspeed"


def _rank(saved: EngineFiles, mp: int, errors: ErrorCollector) -> EngineRank:
    state, where = saved.model_states[mp], f"rank {mp} of {saved.mp_world_size}"
    groups = read_param_shapes(state, where, errors)
    weights = read_module_state(state.get("module"), where, errors)
    if saved.is_zero3:
        # What ZeRO 3 leaves in the module is empty.
        weights = {}
    masters = [ZeroOptimizerState(saved.optim_states[mp], groups, where, errors)] if saved.optim_states[mp] else []
    trained = {name: shape for group in groups for name, shape in group.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()} | trained
    return EngineRank(weights, shapes, set(trained), masters)


def counts(ranks: int, step: int) -> dict:
    """What every model-states file says of the run. No optimizer, no schedule: they would take the place of a run's."""
    return {"dp_world_size": 1, "mp_world_size": ranks, "global_steps": step, "skipped_steps": 0}


class EngineFormat(Format):
    name = NAME
    description = (
        f"{LATEST} (or the folder that it names) with mp_rank_00_model_states.pt and the like (DeepSpeed engine)"
    )
    has_layout = True
    options = TagOptions

    def recognise(self, path: Path) -> bool:
        try:
            tag = find_tag_folder(path, LATEST)
        except CheckpointError:
            return True
        return has_model_states(tag) and not has_layer_states(tag) and not (tag / "zero").is_dir()

    def open(self, path: Path) -> Reader:
        tag = find_tag_folder(path, LATEST)
        if has_layer_states(tag):
            raise CheckpointError(Problem(f"{tag}", "the files of one module", "layers", "Say --from pipeline."))
        saved = EngineFiles(tag)
        errors = ErrorCollector(f"{tag} does not hold the model of its sizes", CheckpointError)
        held = [_rank(saved, mp, errors) for mp in range(saved.mp_world_size)]
        return EngineReader(NAME, path, find_root(path, tag), saved, held, errors)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Module states of each tensor-parallel rank, side by side."""
        errors = ErrorCollector("a DeepSpeed engine cannot hold the model so", ConfigError)
        check_tp(source.model_config, options.tp, errors)
        if options.pp > 1:
            errors.add(f"pp = {options.pp}", "1", options.pp, "Of a pipeline the format is named pipeline.")
        errors.raise_if_any()
        model_record.write(source, output)
        stored = fused_tensors.stored_tensors(source.arch, source.model_config, "mcore")
        pieces = TpShards(source, options.tp, pad_vocab_size(source.model_config, options.tp))
        tag = self.parse_options(options.extra).folder(source.step)
        output.write_torch_files(
            {
                f"{tag}/{model_states_file(rank)}": {
                    "module": {name: pieces.lazy_shard(item, rank) for name, item in stored.items()},
                    **counts(options.tp, source.step),
                }
                for rank in range(options.tp)
            }
        )
        # Last: DeepSpeed takes a folder without it for none.
        output.write_text(LATEST, tag)
