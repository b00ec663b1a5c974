from megatron_ligo.api.checkpoints import convert as convert
from megatron_ligo.api.checkpoints import inspect as inspect
from megatron_ligo.api.checkpoints import verify as verify
from megatron_ligo.api.fitting import fit as fit
from megatron_ligo.api.growing import grow as grow
from megatron_ligo.api.growing import write_handoff as write_handoff
from megatron_ligo.api.plans import plan as plan
from megatron_ligo.api.sources import open_model as open_model
from megatron_ligo.api.sources import open_state_dict as open_state_dict
from megatron_ligo.api.training_scripts import deepspeed_mpu as deepspeed_mpu
from megatron_ligo.api.training_scripts import load_universal as load_universal
from megatron_ligo.api.training_scripts import prepare_for_universal as prepare_for_universal
from megatron_ligo.common.errors import CheckpointError as CheckpointError
from megatron_ligo.common.errors import ConfigError as ConfigError
from megatron_ligo.common.errors import DataError as DataError
from megatron_ligo.common.errors import LayoutError as LayoutError
from megatron_ligo.common.errors import LigoError as LigoError
from megatron_ligo.common.errors import MachineError as MachineError
from megatron_ligo.common.errors import Problem as Problem

__version__: str
