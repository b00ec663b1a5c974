"""DeepSpeed engine checkpoints: module states of each tensor-parallel rank, and ZeRO's optimizer states.

    DIR/latest                                                 the tag
    DIR/TAG/mp_rank_TT_model_states.pt
    DIR/TAG/[bf16_]zero_pp_rank_D_mp_rank_TT_optim_states.pt   read only: any ZeRO stage, fp32, bf16 and fp16
    DIR/dims.json or config.json                               the model's config, which DeepSpeed does not read

Parameters have Megatron-core's names, or transformers' if the engine trained such a model (read only). The writer
stores module states only. An engine at the same tensor parallelism and ZeRO 0, 1 or 2 loads them with
`load_checkpoint(DIR, load_module_only=True)`. ZeRO 3 needs files of its own layout: use a universal checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.deepspeed.engine_rank import (
    EngineRank,
    read_frozen,
    read_module_state,
    read_param_shapes,
)
from megatron_ligo.checkpoint.formats.deepspeed.latest_tag import TagOptions, find_tag_folder
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import (
    LATEST,
    EngineFiles,
    has_layer_states,
    has_model_states,
    model_states_file,
)
from megatron_ligo.checkpoint.formats.deepspeed.reader import EngineReader, find_root
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import ZeroOptimizerState
from megatron_ligo.checkpoint.formats.neox.layer_files import is_neox
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.io.tp_shards import TpShards, pad_vocab_size
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.tensor_parallel import check_tp

NAME = "deepspeed"


def build_run_counters(num_ranks: int, step: int) -> dict:
    """Returns the counters of a model-states file. Optimizer and scheduler are left out, as a run keeps its own."""
    return {"dp_world_size": 1, "mp_world_size": num_ranks, "global_steps": step, "skipped_steps": 0}


def _read_rank(files: EngineFiles, mp_rank: int, errors: ErrorCollector) -> EngineRank:
    state, where = files.model_states[mp_rank], f"rank {mp_rank} of {files.mp_world_size}"
    param_shapes = read_param_shapes(state, where, errors)
    module_state = read_module_state(state.get("module"), where, errors)
    if files.is_zero3:
        # ZeRO 3 leaves empty tensors in the module.
        module_state = {}
    optim_states = files.optim_states[mp_rank]
    optimizer_states = [ZeroOptimizerState(optim_states, param_shapes, where, errors)] if optim_states else []
    trained = {name: shape for shapes in param_shapes for name, shape in shapes.items()}
    frozen_shapes, frozen = read_frozen(state, files.frozen_fragments[mp_rank], where, errors)
    shapes = {name: tuple(tensor.shape) for name, tensor in module_state.items()} | dict(frozen_shapes) | trained
    return EngineRank(module_state, shapes, set(trained), optimizer_states, frozen)


class EngineFormat(Format):
    name = NAME
    description = (
        f"{LATEST} (or the folder that it names) with mp_rank_00_model_states.pt and the like (DeepSpeed engine)"
    )
    has_layout = True
    options = TagOptions

    def recognise(self, path: Path) -> bool:
        try:
            tag_folder = find_tag_folder(path, LATEST)
        except CheckpointError:
            return True
        is_other = is_neox(tag_folder) or (tag_folder / "zero").is_dir()
        return has_model_states(tag_folder) and not has_layer_states(tag_folder) and not is_other

    def open(self, path: Path, accepted: AcceptedKeys) -> Reader:
        tag_folder = find_tag_folder(path, LATEST)
        if has_layer_states(tag_folder):
            hint = "Say --from pipeline."
            raise CheckpointError(Problem(f"{tag_folder}", "module states", "layers of a pipeline", hint))
        files = EngineFiles(tag_folder)
        errors = ErrorCollector(f"{tag_folder} does not hold the model of its config", CheckpointError)
        ranks = [_read_rank(files, mp_rank, errors) for mp_rank in range(files.mp_world_size)]
        return EngineReader(NAME, path, find_root(path, tag_folder), files, ranks, accepted, errors)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes the module states of all tensor-parallel ranks, tensor by tensor, side by side."""
        errors = ErrorCollector("a DeepSpeed engine cannot hold the model at this layout", ConfigError)
        check_tp(source.model_config, options.tp, errors)
        if options.pp > 1:
            errors.add(f"pp = {options.pp}", "1", options.pp, "For a pipeline, choose the format pipeline.")
        errors.raise_if_any()
        model_record.write(source, output)
        stored_tensors = fused_tensors.stored_tensors(source.arch, source.model_config, "mcore")
        shards = TpShards(source, options.tp, pad_vocab_size(source.model_config, options.tp))
        tag = self.parse_options(options.extra).folder(source.step)
        output.write_torch_files(
            {
                f"{tag}/{model_states_file(rank)}": {
                    "module": {name: shards.lazy_shard(stored, rank) for name, stored in stored_tensors.items()},
                    **build_run_counters(options.tp, source.step),
                }
                for rank in range(options.tp)
            }
        )
        # Written last: without it, DeepSpeed sees no checkpoint.
        output.write_text(LATEST, tag)
