"""State dicts of Megatron-core's modules, by the names of the parameter tables under every layer spec.

Transformer Engine keeps a layer's norms inside the linears behind them, and each of its modules, like each of
Megatron-core's, saves a state of its own beside the weights. Neither reaches a checkpoint, so that one fits all.
"""

from __future__ import annotations

from functools import partial

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_ligo.arch.mcore_names import EXTRA_STATE, to_local_name


def use_table_names(model: nn.Module, first_expert: int = 0) -> None:
    """Makes state dicts of the model and of its layers hold the tables' names and only weights, and load from such.

    first_expert: the first one of this rank.
    """
    for module in model.modules():
        module.register_state_dict_post_hook(_drop_extra_state)
        module.register_load_state_dict_post_hook(_expect_no_extra_state)
        if isinstance(module, TransformerLayer) and _names_in_tables(module, first_expert):
            module.register_state_dict_post_hook(partial(_write_table_names, first_expert))
            module.register_load_state_dict_pre_hook(partial(_read_table_names, first_expert))


def _names_in_tables(layer: nn.Module, first_expert: int) -> dict[str, str]:
    """Returns the tables' names of the layer's parameters that its modules call otherwise, by the modules' names."""
    names = {name: to_local_name(name, first_expert) for name, _ in layer.named_parameters()}
    return {name: table_name for name, table_name in names.items() if name != table_name}


def _drop_extra_state(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:
    # The converter of DeepSpeed would take it for a weight.
    state.pop(prefix + EXTRA_STATE, None)


def _expect_no_extra_state(module: nn.Module, incompatible_keys: tuple[list[str], list[str]]) -> None:
    missing, _ = incompatible_keys
    missing[:] = [key for key in missing if not key.endswith(EXTRA_STATE)]


def _write_table_names(first_expert: int, layer: nn.Module, state: dict, prefix: str, metadata: object) -> None:
    _rename(state, prefix, _names_in_tables(layer, first_expert))


def _read_table_names(first_expert: int, layer: nn.Module, state: dict, prefix: str, *_: object) -> None:
    names = _names_in_tables(layer, first_expert)
    _rename(state, prefix, {table_name: name for name, table_name in names.items()})


def _rename(state: dict[str, Tensor], prefix: str, names: dict[str, str]) -> None:
    for old, new in names.items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
