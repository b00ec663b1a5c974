"""The hand-off: a grown model as DeepSpeed takes it at any layout, as transformers takes it, and where it comes from.

FOLDER/universal/     DeepSpeed universal checkpoint at iteration 0
FOLDER/hf/            Hugging Face safetensors, config and tokenizer
FOLDER/growth.json    source, sizes, operator, fit, versions; written last: a folder without it is not whole
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

import megatron_ligo
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import Progress, convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.manifest import library_versions
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup
from megatron_ligo.export import provenance
from megatron_ligo.export.grown_reader import GrownReader, digest_operator, digest_weights
from megatron_ligo.growth import adam_state
from megatron_ligo.growth.methods import describe_method
from megatron_ligo.growth.operator_file import OperatorFile
from megatron_ligo.growth.validation import build_initial_operator

log = logging.getLogger(__name__)

UNIVERSAL = "universal"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_handoff(
    source: Reader,
    folder: str | Path,
    dtype: torch.dtype | None,
    to: Sequence[str],
    record: dict,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: RankGroup = SINGLE_RANK,
) -> dict:
    """Writes a model (`source`, mostly a `Grown`) into FOLDER in the formats `to`; returns growth.json's content.

    dtype: of the weights where the format leaves a choice (None: each tensor's own; the universal checkpoint is
    fp32). record: what growth.json says besides the large model's sizes and the versions (`build_growth_record` makes
    it). ranks: `convert`'s. Killed and run again, it goes on; run again when done, it leaves all as it is. Each
    format appears whole or
    not at all. Raises CheckpointError with every bad tensor in one error.
    """
    folder = Path(folder)
    with ExitStack() as held:
        with ranks.agree():
            if ranks.rank == 0:
                held.enter_context(exclusive_access(folder))
                if not overwrite:
                    _check_same_model(folder, record)
        # The others are read from the universal checkpoint, so that each tensor is grown once.
        for name in sorted(to, key=lambda name: name != UNIVERSAL):
            options = WriteOptions(dtype=formats.get(name).stored_dtype or dtype)
            convert(source, folder / name, name, options, overwrite=overwrite, progress=progress, ranks=ranks)
            if name == UNIVERSAL:
                source = formats.open(folder / name)
        versions = {"megatron_ligo": megatron_ligo.__version__, **library_versions()}
        own = {"large": source.model_config.to_json(), "formats": list(to), "versions": versions}
        made = {**record, **own}
        with ranks.agree():
            return provenance.write(folder, made) if ranks.rank == 0 else made


def _check_same_model(folder: Path, record: dict) -> None:
    """A hand-off's formats hold one model: more of them may join those that are there, of no other model."""
    found = provenance.read(folder)
    ours = json.loads(json.dumps(record))
    differ = [name for name in ours if found is not None and found.get(name) != ours[name]]
    if differ:
        hint = "Choose another --output, or remove it."
        raise ConfigError(Problem(f"{folder}", "no hand-off, or one of the same", f"another {', '.join(differ)}", hint))


def grow_from_config(
    config: RunConfig,
    operator: Path | None,
    folder: Path,
    progress: Progress | None = None,
    ranks: RankGroup = SINGLE_RANK,
) -> dict:
    """What `tools/grow.py` does: the config's small model, grown by an operator's folder (None: by the initialisation
    that [operator] names), into a hand-off. Returns growth.json's content."""
    small = config.small
    if not small.path:
        raise ConfigError(Problem("small.path", "the small model's checkpoint", "nothing", "Set it in [small]."))
    section = config.handoff
    with ranks.agree():
        reader = formats.open(small.path, None if small.format == "auto" else small.format)
        if operator:
            chosen = OperatorFile(operator)
        else:
            chosen = build_initial_operator(reader.model_config, config.large, config.operator)
            log.info("%s", describe_method(chosen.settings, chosen.small, chosen.large))
        grown = GrownReader(chosen, reader, section.moments)
        record = build_growth_record(grown) if ranks.rank == 0 else {}
    dtype = DTYPES[section.dtype]
    return write_handoff(grown, folder, dtype, section.formats, record, progress=progress, ranks=ranks)


def build_growth_record(grown: GrownReader) -> dict:
    """Where a grown model comes from: the source and its digest, the operator's settings and digest, and (where it
    was learned) the fit's own record: config, losses, layout, digest of the evaluation batch."""
    operator, source = grown.operator, grown.source
    fit = None
    if isinstance(operator, OperatorFile):
        fit = {key: value for key, value in operator.record.items() if key not in ("small", "large", "settings")}
    name = source.path.name if source.path else None
    return {
        "small": source.model_config.to_json(),
        "source": {"path": name, "format": source.format, "digest": digest_weights(source)},
        "operator": {"settings": vars(operator.settings), "digest": digest_operator(operator)},
        "fit": fit,
        "moments": build_moments_record(grown),
    }


def build_moments_record(grown: GrownReader) -> dict | None:
    """What became of Adam's state; None where it begins anew."""
    if not grown.has_moments:
        return None
    dense = adam_state.find_estimated_maps(grown.operator)
    split = adam_state.splits_kv_groups(grown.operator)
    keys = "; an estimate for k, v: copies of a KV group hold unlike query heads" if split else ""
    squares = "the dual maps squared entry by entry: "
    squares += "an estimate where maps have several entries" if dense else "exact where exp_avg is, rows have one entry"
    return {
        "policy": grown.moments,
        "step": grown.step,
        "exp_avg": "the dual maps: exact where the grown model computes what the small one does" + keys,
        "exp_avg_sq": squares + keys,
        "maps_with_several_entries": dense,
        "layers_at_zero": adam_state.find_new_layers(grown.operator),
    }
