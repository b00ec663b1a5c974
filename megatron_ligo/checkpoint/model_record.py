"""dims.json and the tokenizer's files, which lie beside a checkpoint whose format has no config of its own.

Every writer but Hugging Face's calls `write`; the readers call `read` and `find_carried_files`. A training run keeps a
folder of these files (`write_folder`) and puts them beside each of its checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys, check_agreement
from megatron_ligo.common.atomic_files import remove_tree, write_json
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem

RECORD = "dims.json"
VERSION = 1
# The key of this program's state in DeepSpeed's checkpoints, and its entry that tells a model from an operator.
RUN_STATE, RUN_STATE_CONTENT = "megatron_ligo", "holds"
# The preprocessing of images, including their size.
IMAGE_PROCESSOR = "preprocessor_config.json"
# Tokenizer, generation settings, chat template, licence: conversions copy them unchanged.
CARRIED_FILES = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
    IMAGE_PROCESSOR,
)  # fmt: skip


def find_carried_files(folder: Path) -> tuple[Path, ...]:
    """Returns the files of a folder that conversions copy unchanged."""
    return tuple(sorted({file for pattern in CARRIED_FILES for file in folder.glob(pattern) if file.is_file()}))


def write(source: Reader, output: Output) -> None:
    """Writes dims.json and copies the carried files into the output's root."""
    output.write_json(RECORD, _to_json(source.model_config, source.carried))
    for file in source.files:
        output.copy_file(file)


def write_folder(folder: Path, model_config: ModelConfig, carried: Mapping[str, object], files: Sequence[Path]) -> None:
    """Writes dims.json and the carried files into a folder of their own, replacing it."""
    remove_tree(folder)
    folder.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / RECORD, _to_json(model_config, carried))


def _to_json(model_config: ModelConfig, carried: Mapping[str, object]) -> dict:
    return {"version": VERSION, "dims": model_config.to_json(), "carried": dict(carried)}


def find_record(folder: Path, accepted: AcceptedKeys = NO_KEYS) -> tuple[ModelConfig, Mapping[str, object]] | None:
    """Returns the sizes and carried config keys of a folder with dims.json or a Hugging Face config.json, else None.

    Where both are there, they must agree.
    """
    path, record = folder / config_json.CONFIG, None
    if path.is_file():
        config = config_json.load_config(path)
        record = config_json.parse_model_config(config, str(path), accepted), config_json.parse_carried(config)
        check_beside(folder, record[0], accepted)
    return _read_record(folder / RECORD, accepted) if (folder / RECORD).is_file() else record


def check_beside(folder: Path, model_config: ModelConfig, accepted: AcceptedKeys = NO_KEYS) -> None:
    """Raises CheckpointError if a folder's dims.json states other sizes than its config.json.

    model_config: the config.json's. Parts that only tensors prove are not compared.
    """
    path = folder / RECORD
    if not path.is_file():
        return
    recorded, _ = _read_record(path, accepted)
    errors = ErrorCollector(f"{path} describes another model than {config_json.CONFIG}", CheckpointError)
    if recorded.model_type != model_config.model_type:
        errors.add(f"{path}: model_type", f"{model_config.model_type}, as in config.json", recorded.model_type)
        errors.raise_if_any()
    parts = architectures.get(model_config.arch).optional_parts(model_config.model_type)
    sizes = {name: value for name, value in recorded.to_json().items() if name not in parts}
    check_agreement(sizes, model_config.to_json(), str(path), config_json.CONFIG, errors)
    errors.raise_if_any()


def has_record(folder: Path) -> bool:
    """Returns whether a folder holds a file that states a model's sizes."""
    return (folder / RECORD).is_file() or (folder / config_json.CONFIG).is_file()


def read(folder: Path, accepted: AcceptedKeys = NO_KEYS) -> tuple[ModelConfig, Mapping[str, object]]:
    """Like `find_record`, but raises CheckpointError if neither file is there."""
    record = find_record(folder, accepted)
    if record is None:
        hint = "Put the model's Hugging Face config.json there."
        raise CheckpointError(
            Problem(f"{folder}", f"{RECORD} or {config_json.CONFIG} with the model's sizes", "none", hint)
        )
    return record


def _read_record(path: Path, accepted: AcceptedKeys) -> tuple[ModelConfig, Mapping[str, object]]:
    data = config_json.load_config(path)
    try:
        if data["version"] != VERSION:
            raise CheckpointError(Problem(f"{path}", f"version {VERSION}", data["version"]))
        model_config, carried = ModelConfig.from_json(data["dims"]), dict(data["carried"])
        architectures.get(model_config.arch).hf_classes(model_config.model_type)
        return model_config, config_json.check_carried(model_config, carried, str(path), accepted)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(Problem(f"{path}", "a record that this program wrote", f"{error!r}")) from None
    except ConfigError as error:
        errors = ErrorCollector(f"{path} does not state the sizes of a model", CheckpointError)
        errors.problems.extend(error.problems)
    errors.raise_if_any()
    raise AssertionError("a refused config states its problems")
