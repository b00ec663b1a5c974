"""Stand-ins for packages that Megatron-Bridge imports, and that need a GPU or do nothing for a checkpoint.

Any attribute of such a module is a class that can be called, subclassed and used as a decorator.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types

NAMES = (
    "transformer_engine", "transformer_engine_torch", "modelopt", "nvidia_resiliency_ext", "flash_attn", "diffusers",
    "fla", "flashinfer", "mamba_ssm", "causal_conv1d", "qwen_vl_utils", "timm", "open_clip", "mlflow", "comet_ml",
    "nvdlfw_inspect", "mistral_common", "nemo_run", "webdataset", "soundfile", "librosa", "wandb", "datasets", "peft",
    "fast_hadamard_transform", "megatron.energon",
)  # fmt: skip


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (_Anything,), {})


class _Anything(metaclass=_AnyAttribute):
    def __init__(self, *_: object, **__: object):
        pass

    def __call__(self, *arguments: object, **_: object) -> object:
        return arguments[0] if arguments and callable(arguments[0]) else self


class _Module(types.ModuleType):
    __version__ = "99.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _AnyAttribute(name, (_Anything,), {}))
        return self.__dict__[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == known or name.startswith(f"{known}.") for known in NAMES):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Puts the stand-ins of packages that are not installed behind all other ways to find a module."""
    sys.meta_path.append(_Finder())
