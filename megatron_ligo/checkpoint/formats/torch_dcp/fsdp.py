"""torch.distributed.checkpoint of a model with Hugging Face's names: FSDP2, Accelerate, the Trainer.

In a training script:

    state = {"model": model.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id=DIR)

The names begin with "model." for that reason; another prefix, or none, is read too. Read are the weights, whatever the
number of ranks that wrote them; an optimizer's state is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, FormatOptions, WriteOptions
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.hf.format import NAME as HF
from megatron_ligo.checkpoint.formats.hf.format import HfNamesReader
from megatron_ligo.checkpoint.formats.hf.shards import ACCELERATE_FOLDER, WeightShards, describe_optimizer
from megatron_ligo.checkpoint.formats.torch_dcp import dcp_folder
from megatron_ligo.checkpoint.formats.torch_dcp.dcp_folder import DcpTensors
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.config.typed_toml import setting

NAME = "fsdp"


class FsdpReader(HfNamesReader):
    """Reads canonical tensors, joined from the ranks' chunks."""

    format = NAME

    def __init__(self, path: Path, folder: Path, accepted: AcceptedKeys = NO_KEYS):
        config = dcp_folder.find_config(folder)
        tensors, shards = DcpTensors(folder), WeightShards([])
        shards.add(folder, tensors)
        super().__init__(config_json.load_config(config), shards, f"{config}", accepted)
        model_record.check_beside(config.parent, self.model_config, accepted)
        self.path = path
        self.files = model_record.find_carried_files(config.parent)
        self.unread = tensors.describe_unread()
        if folder.name == ACCELERATE_FOLDER:
            self.unread += describe_optimizer(folder.parent)


@dataclass(frozen=True)
class FsdpOptions(FormatOptions):
    prefix: str = setting("model.", 'beginning of every name (default "model.", the key of the state that is loaded)')


class FsdpFormat(Format):
    name = NAME
    description = ".metadata of torch.distributed.checkpoint (FSDP2, Accelerate), with config.json in it or beside it"
    options = FsdpOptions

    def recognise(self, path: Path) -> bool:
        folder = dcp_folder.find_folder(path)
        return folder is not None and not dcp_folder.is_torchtitan(folder)

    def open(self, path: Path, accepted: AcceptedKeys) -> FsdpReader:
        return FsdpReader(path, dcp_folder.find_folder(path) or path, accepted)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes config.json and one file of whole tensors for each layer. Ranks take their parts as they load.

        Raises ConfigError for experts.
        """
        if source.model_config.num_experts:
            hint = "In memory transformers holds a layer's experts as one tensor: load its hf folder."
            raise ConfigError(Problem(NAME, "a model without experts", source.model_config.model_type, hint))
        dtypes = [source.info(key).dtype for key in source.keys()]  # noqa: SIM118 - no dict
        dtype = max(set(dtypes), key=dtypes.count)
        output.write_json(config_json.CONFIG, config_json.to_hf_config(source.model_config, source.carried, dtype))
        dcp_folder.write_folder(source, output, HF, self.parse_options(options.extra).prefix)
        for file in source.files:
            output.copy_file(file)
