"""Opens what the API takes as a model: a path, a model of transformers, a state dict, or a Reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from torch import Tensor

from megatron_ligo.checkpoint.convert import open_source
from megatron_ligo.checkpoint.formats.hf import transformers_model
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import machine_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ModelSource: TypeAlias = Union[str, Path, Reader, "PreTrainedModel"]


@machine_errors()
def open_model(model: ModelSource, *, format: str | None = None, accept: Iterable[str] = ()) -> Reader:
    """Opens a model as a Reader of canonical tensors, whose memory it shares.

    model: a checkpoint of any format, a model of transformers, or a Reader, which is returned as it is. format: that
    of a path; None: it is recognised. accept: unknown keys of its config that may pass.
    Raises CheckpointError with everything that is wrong with it.
    """
    if isinstance(model, Reader):
        return model
    if isinstance(model, str | Path):
        return open_source(model, format, accept)
    accepted = AcceptedKeys(accept)
    reader = transformers_model.read_model(model, accepted)
    return _finish(reader, accepted, type(model).__name__)


@machine_errors()
def open_state_dict(
    state: Mapping[str, Tensor], config: Mapping[str, object] | PreTrainedConfig, *, accept: Iterable[str] = ()
) -> Reader:
    """Opens a state dict: tensors of a checkpoint's names and shapes, and the config of their model.

    config: a config of transformers, or the content of a config.json. Raises CheckpointError as for a folder.
    """
    accepted = AcceptedKeys(accept)
    content = config if isinstance(config, Mapping) else transformers_model.config_content(config)
    reader = transformers_model.read_state_dict(state, content, accepted=accepted)
    return _finish(reader, accepted, "the state dict's config")


def _finish(reader: Reader, accepted: AcceptedKeys, where: str) -> Reader:
    accepted.check_used(where)
    reader.accepted = accepted.used
    return reader
