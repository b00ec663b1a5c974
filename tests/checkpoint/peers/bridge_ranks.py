"""Rank functions: Megatron-Bridge's own loaders on our folders, on the CPU."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch

from tests.checkpoint.peers import absent_packages

# Whatever computes on a GPU or fuses, off.
CPU = {
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "bf16": False,
    "fp16": False,
    "params_dtype": torch.float32,
    "use_cpu_initialization": True,
}


def _prepare() -> None:
    # Imported without the stand-ins, Megatron-core knows that there is no Transformer Engine.
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt  # noqa: F401

    absent_packages.install()
    torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.cuda.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
    torch.cuda.Stream = type("Stream", (), {"__init__": lambda self, *_, **__: None})
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def _tensors(model) -> dict[str, torch.Tensor]:
    model = model[0] if isinstance(model, list) else model
    return {name: value.detach() for name, value in model.state_dict().items() if torch.is_tensor(value)}


def _differences(model, expected: dict[str, torch.Tensor]) -> list[str]:
    tensors = _tensors(model)
    assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
    return [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]


def _import(hf: str) -> tuple[object, dict[str, torch.Tensor]]:
    """Returns AutoBridge of a Hugging Face folder, and the tensors of the Megatron model that it makes."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider(load_weights=True)
    for name, value in CPU.items():
        setattr(provider, name, value)
    provider.transformer_layer_spec = local_layer_spec
    provider.finalize()
    return bridge, _tensors(provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True))


def load(hf: str, folder: str) -> dict[str, object]:
    """Loads `folder`, ours, by AutoBridge, and by the reader of Megatron-LM's args without run_config.yaml.

    Returns for each what differs from Megatron-Bridge's own import of `hf`; and the dropouts of both configs.
    """
    _prepare()
    from megatron.bridge.training.model_load_save import load_megatron_model, load_model_config

    bridge, expected = _import(hf)
    root = Path(folder)
    _use_local_layers(root / "iter_0000000" / "run_config.yaml")
    results: dict[str, object] = {"AutoBridge": _differences(bridge.load_megatron_model(folder), expected)}
    config, _ = load_model_config(str(root / "iter_0000000"))
    by_args = Path(f"{folder}-args")
    shutil.copytree(root / "iter_0000000", by_args)
    (by_args / "run_config.yaml").unlink()
    other, _ = load_model_config(str(by_args))
    results["dropouts"] = [config.hidden_dropout, config.attention_dropout, other.hidden_dropout,
                           other.attention_dropout]  # fmt: skip
    _use_local_args(by_args / "common.pt")
    model = load_megatron_model(str(by_args), model_type="gpt", use_cpu_init=True, skip_temp_dist_context=True)
    results["args"] = _differences(model, expected)
    return results


def _use_local_layers(path: Path) -> None:
    """Replaces Transformer Engine's layers, which need a GPU, in a run_config.yaml."""
    import yaml

    config = yaml.safe_load(path.read_text())
    config["model"]["transformer_layer_spec"] = {
        "_target_": "megatron.bridge.models.gpt_provider.local_layer_spec",
        "_call_": False,
    }
    config["model"] |= {name: value for name, value in CPU.items() if isinstance(value, bool)}
    path.write_text(yaml.safe_dump(config))


def _use_local_args(path: Path) -> None:
    """The same in Megatron-LM's args, and the tokenizer of the run, which those of a conversion do not state."""
    state = torch.load(path, weights_only=False)
    args = copy.deepcopy(state["args"])
    vars(args).update({name: value for name, value in CPU.items() if isinstance(value, bool)})
    vars(args).update(transformer_impl="local", no_persist_layer_norm=True, tokenizer_type="NullTokenizer",
                      tokenizer_model=None, vocab_size=args.padded_vocab_size)  # fmt: skip
    torch.save({**state, "args": args}, path)


def save(hf: str, folder: str) -> None:
    """Imports a Hugging Face folder by AutoBridge and saves Megatron-Bridge's own checkpoint."""
    import multiprocessing

    multiprocessing.current_process()._config["daemon"] = False
    _prepare()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider(load_weights=True)
    for name, value in CPU.items():
        setattr(provider, name, value)
    provider.transformer_layer_spec = local_layer_spec
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, folder)
