"""Writes the hand-off: a grown model, to pretrain at any layout or load in transformers, and the record of its origin.

FOLDER/universal/     DeepSpeed universal checkpoint at iteration 0
FOLDER/hf/            Hugging Face safetensors, config and tokenizer
FOLDER/growth.json    source, sizes, operator, fit, versions; written last: a folder without it is incomplete
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
from megatron_ligo.checkpoint.content import digest_weights
from megatron_ligo.checkpoint.convert import Progress, convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.manifest import library_versions
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.common.file_digest import SEAL, hash_json
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.common.folder_kinds import HANDOFF, check_output, find_operator_part
from megatron_ligo.common.nvidia_driver import DRIVER_VERSION
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.export import provenance
from megatron_ligo.export.grown_reader import CPU, GrownReader, digest_operator
from megatron_ligo.export.run_inputs import INPUTS, SMALL_MODEL, describe_model
from megatron_ligo.growth import adam_state
from megatron_ligo.growth.methods import describe_method
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.operator_file import OperatorFile
from megatron_ligo.growth.validation import build_initial_operator, check_matches_config

log = logging.getLogger(__name__)

UNIVERSAL = "universal"
ACCEPT_HINT = "Or pass --accept-changed-data, which is recorded."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_handoff(
    source: Reader,
    folder: str | Path,
    dtype: torch.dtype | None,
    format_names: Sequence[str],
    record: dict,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: RankGroup = SINGLE_RANK,
) -> dict:
    """Writes a model, usually a `GrownReader`, into a folder in several formats; returns the content of growth.json.

    dtype: of the weights, in formats that store any dtype; None: each tensor's own. record: the content of growth.json
    without the large model's sizes, formats and versions (`build_growth_record`). overwrite, progress, ranks: as in
    `convert`. An interrupted call resumes, a repeated one changes nothing, and each format appears whole or not
    at all. Raises CheckpointError with every bad tensor, ConfigError if the folder holds another model.
    """
    folder = Path(folder)
    with ExitStack() as locks:
        with ranks.agree():
            if ranks.rank == 0:
                locks.enter_context(exclusive_access(folder))
                if not overwrite:
                    _check_same_model(folder, record)
        content = {}
        # The universal checkpoint comes first; the others are converted from it, so that each tensor is grown once.
        for name in sorted(format_names, key=lambda name: name != UNIVERSAL):
            options = WriteOptions(dtype=formats.get(name).stored_dtype or dtype)
            manifest = convert(
                source, folder / name, name, options, overwrite=overwrite, progress=progress, ranks=ranks
            )
            content[name] = hash_json(manifest.digests)
            if name == UNIVERSAL:
                source = formats.open(folder / name)
        versions = {"megatron_ligo": megatron_ligo.__version__, **library_versions()}
        large = {"large": source.model_config.to_json(), "formats": list(format_names), "versions": versions}
        complete_record = {**record, **large, "content": content}
        with ranks.agree():
            return provenance.write(folder, complete_record) if ranks.rank == 0 else complete_record


def _check_same_model(folder: Path, record: dict) -> None:
    """Raises ConfigError if the folder holds a hand-off of another model; formats of the same model may be added."""
    existing = provenance.read(folder)
    new = json.loads(json.dumps(record))
    # The records of earlier versions do not name its place.
    differences = [key for key in new if existing is not None and key != INPUTS and existing.get(key) != new[key]]
    if differences:
        found = f"one with another {', '.join(differences)}"
        hint = "Choose another --output, or remove the folder."
        raise ConfigError(Problem(f"{folder}", "no hand-off, or one of the same model", found, hint))


def grow_from_config(
    config: RunConfig,
    operator_folder: Path | None,
    folder: Path,
    progress: Progress | None = None,
    ranks: RankGroup = SINGLE_RANK,
    accept_changed: bool = False,
) -> dict:
    """Grows the config's small model into a hand-off; returns the content of growth.json.

    operator_folder: a fitted operator; None: the initialisation that [operator] describes. accept_changed: grows even
    if the operator was fitted on other weights, or the config asks for another operator; growth.json records it.
    Raises CheckpointError with every such difference otherwise.
    """
    small = config.small
    if not small.path:
        raise ConfigError(Problem("small.path", "a checkpoint of the small model", "none", "Set it in [small]."))
    with ranks.agree():
        check_output(folder, HANDOFF)
        reader = formats.open_small(small)
        if operator_folder:
            operator = OperatorFile(find_operator_part(operator_folder))
        else:
            operator = build_initial_operator(reader.model_config, config.large, config.operator)
            log.info("%s", describe_method(operator.settings, operator.small, operator.large))
    return write_grown_model(operator, reader, config, folder, progress, ranks, accept_changed)


def write_grown_model(
    operator: Operator,
    reader: Reader,
    config: RunConfig,
    folder: Path,
    progress: Progress | None = None,
    ranks: RankGroup = SINGLE_RANK,
    accept_changed: bool = False,
) -> dict:
    """Grows a small model into a hand-off as [handoff] states; returns the content of growth.json.

    An operator's file must be what [large] and [operator] ask for, and fitted on these weights, as in
    `grow_from_config`.
    """
    section = config.handoff
    with ranks.agree():
        grown = GrownReader(operator, reader, section.moments, select_growth_device())
    digest = digest_weights(reader, DigestCache(ranks))
    with ranks.agree():
        record = {}
        if ranks.rank == 0:
            changes = []
            if isinstance(operator, OperatorFile):
                changes = check_operator(operator, config, f"{reader.path or reader.format}", digest, accept_changed)
            record = build_growth_record(grown, digest) | ({"accepted_changes": changes} if changes else {})
            if reader.path is not None and INPUTS not in (record["fit"] or {}):
                record[INPUTS] = describe_model(SMALL_MODEL, f"{reader.path}", digest, reader)
    dtype = DTYPES[section.dtype]
    return write_handoff(grown, folder, dtype, section.formats, record, progress=progress, ranks=ranks)


def select_growth_device() -> torch.device:
    """Returns where the products of a growth are computed: this process's GPU, or the CPU.

    Raises LayoutError if there are GPUs that torch cannot use and nobody has chosen the CPU.
    """
    if not DRIVER_VERSION.is_file():
        return CPU
    # It loads DeepSpeed, which a growth on a CPU does without.
    from megatron_ligo.distributed import device

    device.select_local_device()
    return device.current_device()


def check_operator(
    operator: OperatorFile, config: RunConfig, source: str, digest: str, accept_changed: bool
) -> list[str]:
    """Raises CheckpointError unless the operator is what the config asks for and was fitted on weights of `digest`.

    source: the name of those weights. accept_changed: returns the differences, and logs them, instead.
    """
    operator.check_digest()
    errors = ErrorCollector(f"the operator {operator.folder} cannot be applied so", CheckpointError)
    check_matches_config(operator, config, errors)
    fitted_on = operator.source_digest()
    if fitted_on is None:
        log.warning("%s does not state the weights that it was fitted on: they are not compared", operator.folder)
    elif fitted_on != digest:
        expected = f"the weights that the operator was fitted on, digest {fitted_on}"
        errors.add(source, expected, f"digest {digest}", f"Fit an operator on this model. {ACCEPT_HINT}")
    if accept_changed:
        for problem in errors.problems:
            log.warning("accepted: %s", problem)
        return [str(problem) for problem in errors.problems]
    errors.raise_if_any()
    return []


def build_growth_record(grown: GrownReader, digest: str | None = None) -> dict:
    """Returns the origin of a grown model: source, operator, moments and, if it was fitted, the record of the fit.

    digest: that of the source's weights, if it is known already.
    """
    operator, source = grown.operator, grown.source
    fit, operator_record = None, {}
    if isinstance(operator, OperatorFile):
        operator_record = {SEAL: operator.record.get(SEAL)}
        fit = {key: value for key, value in operator.record.items() if key not in ("small", "large", "settings")}
    name = source.path.name if source.path else None
    return {
        "small": source.model_config.to_json(),
        "source": {"path": name, "format": source.format, "digest": digest or digest_weights(source)},
        "operator": {"settings": vars(operator.settings), "digest": digest_operator(operator)} | operator_record,
        "fit": fit,
        "moments": build_moments_record(grown),
    }


def build_moments_record(grown: GrownReader) -> dict | None:
    """Returns how Adam's state was grown and how exact that is; None if it was reset."""
    if not grown.has_moments:
        return None
    # The texts below are the content of growth.json.
    estimated = adam_state.find_estimated_maps(grown.operator)
    splits_groups = adam_state.splits_kv_groups(grown.operator)
    keys = "; an estimate for k, v: copies of a KV group hold unlike query heads" if splits_groups else ""
    if adam_state.copies_normalised_queries(grown.operator):
        keys += "; an estimate for q: copies of its features are normalised together"
    squares = "the dual maps squared entry by entry: "
    squares += (
        "an estimate where maps have several entries" if estimated else "exact where exp_avg is, rows have one entry"
    )
    return {
        "policy": grown.moments,
        "step": grown.step,
        "exp_avg": "the dual maps: exact where the grown model computes what the small one does" + keys,
        "exp_avg_sq": squares + keys,
        "maps_with_several_entries": estimated,
        "layers_at_zero": adam_state.find_new_layers(grown.operator),
    }
