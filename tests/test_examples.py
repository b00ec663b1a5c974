"""Every script in examples/, as its docstring calls it, on tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.distributed.checkpoint import FileSystemReader

import megatron_ligo as ligo
from tests.tiny_models import hf_llama, llama_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LARGE = {"num_layers": 4, "hidden_size": 32, "ffn_size": 40, "num_heads": 8, "num_kv_heads": 4}


def run_example(name: str, arguments: list[str]) -> str:
    """Runs a script in this process, on every rank of a pool; returns what it prints."""
    before, sys.argv = sys.argv, [name, *arguments]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before
    return output.getvalue()


def cuda_device() -> int:
    """What torch.cuda.current_device does in a process without this project's shims."""
    torch.cuda._lazy_init()
    return torch._C._cuda_getDevice()


def run_deepspeed_example(arguments: list[str]) -> str:
    torch.cuda.current_device = cuda_device
    return run_example("deepspeed_megatron.py", arguments)


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    ligo.write_handoff(hf_llama(llama_config()), folder / "grown", **LARGE)
    return folder / "grown"


@pytest.mark.parametrize(
    ("zero", "world"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.long), pytest.param(3, 4, marks=pytest.mark.long)]
)
def test_a_deepspeed_script_of_ones_own(pools, grown, zero, world):
    printed = pools(world).run(run_deepspeed_example, arguments=[str(grown), f"--zero={zero}", "--tp=2"])
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]
    small = llama_config()
    tokens = torch.randint(0, small.vocab_size, (2, small.max_positions), generator=torch.Generator().manual_seed(0))
    logits = hf_llama(small)(tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert len(losses) == 3 and losses[2] < losses[0]


@pytest.mark.long
def test_the_trainer(tmp_path, grown):
    hf_llama(llama_config()).save_pretrained(tmp_path / "small")
    words = [f"w{number}" for number in range(36)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate([*words, "[UNK]"])}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "small" / "tokenizer.json"))
    (tmp_path / "small" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(" ".join(words * 40))
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in LARGE.items()]
    arguments = [str(tmp_path / "small"), str(tmp_path / "texts"), f"--output={tmp_path / 'run'}", "--steps=2", *sizes]
    run_example("hf_trainer.py", arguments)
    assert ligo.inspect(tmp_path / "run" / "final")["dims"]["num_layers"] == 4
    assert ligo.inspect(tmp_path / "run" / "checkpoint-2")["parameters"]


def test_torchtitans_checkpoint(tmp_path, grown):
    """Against the names and the order of rotary pairs that torchtitan 0.3.0 saves."""
    printed = run_example("torchtitan_llama3.py", [str(grown), str(tmp_path / "titan")])
    dims = ligo.inspect(grown)["dims"]
    for part in (f"norm_eps = {dims['norm_eps']}\n", "n_kv_heads = 4\n", f"initial_load_path {tmp_path / 'titan'} "):
        assert part in printed
    metadata = FileSystemReader(tmp_path / "titan").read_metadata().state_dict_metadata
    layer = {name.removeprefix("layers.0.") for name in metadata if name.startswith("layers.0.")}
    projections = {f"attention.qkv_linear.{name}.weight" for name in ("wq", "wk", "wv")}
    feed_forward = {f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")}
    assert layer == projections | feed_forward | {"attention.wo.weight", "attention_norm.weight", "ffn_norm.weight"}
    wq = torch.empty(32, 32)
    dcp.load({"layers.0.attention.qkv_linear.wq.weight": wq}, checkpoint_id=tmp_path / "titan", no_dist=True)
    hf = load_file(grown / "hf" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    heads = LARGE["num_heads"]
    assert torch.equal(wq, hf.view(heads, 2, 32 // heads // 2, 32).transpose(1, 2).reshape(32, 32))
    assert not torch.equal(wq, hf)


def test_the_notebook(tmp_path, monkeypatch):
    """Its cells in turn, as a kernel runs them."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "grow_smollm2.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["difference"] < 1e-4 and names["large"].num_parameters() > names["model"].num_parameters()
    starts = names["starts"]
    assert abs(starts["lossless"]) < 1e-6 and starts["stack"] > 1e-3 and starts["copy"] > 1e-3


def test_megatron_lms_command_line(tmp_path, grown):
    printed = run_example("megatron_lm.py", [str(grown), str(tmp_path / "mcore"), "--tp=2"])
    dims = ligo.inspect(grown)["dims"]
    for part in (f"--norm-epsilon {dims['norm_eps']} ", "--num-query-groups 4 ", "--hidden-dropout 0 ", "--finetune"):
        assert part in printed
    assert ligo.verify(tmp_path / "mcore", grown).same
