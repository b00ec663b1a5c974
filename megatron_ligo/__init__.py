"""Grow trained transformers into larger ones with learned, tensor- and pipeline-parallel linear maps.

The names below are the Python API. Each is imported on its first use, so that `import megatron_ligo` needs neither
torch nor time; `__init__.pyi` states their types.
"""

from importlib import import_module

__version__ = "0.2.0"

_API = {
    "convert": "api.checkpoints",
    "inspect": "api.checkpoints",
    "open_model": "api.sources",
    "open_state_dict": "api.sources",
    "verify": "api.checkpoints",
    "grow": "api.growing",
    "write_handoff": "api.growing",
    "fit": "api.fitting",
    "plan": "api.plans",
    "deepspeed_mpu": "api.training_scripts",
    "load_universal": "api.training_scripts",
    "prepare_for_universal": "api.training_scripts",
    "LigoError": "common.errors",
    "CheckpointError": "common.errors",
    "ConfigError": "common.errors",
    "DataError": "common.errors",
    "LayoutError": "common.errors",
    "MachineError": "common.errors",
    "Problem": "common.errors",
}
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> object:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with import_module(f"{__name__}.common.errors").machine_errors():
        value = getattr(import_module(f"{__name__}.{_API[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
