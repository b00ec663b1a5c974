"""The README's own commands, word for word, on tiny sizes: real launcher, real files, from text to the report."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny_models import hf_llama, llama_dims

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "num_layers = 32": "num_layers = 5",
    "hidden_size = 768": "hidden_size = 32",
    "ffn_size = 2048": "ffn_size = 48",
    "num_heads = 12": "num_heads = 8",
    "num_kv_heads = 4": "num_kv_heads = 4",
    "seq_length = 1024": "seq_length = 16",
    "steps = 100\n": "steps = 4\nlr = 1e-3\n",
    "steps = 1000": "steps = 3",
}


def blocks(kind: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    found = re.findall(rf"^ *```{kind}\n(.*?)^ *```", text, flags=re.M | re.S)
    return ["\n".join(line.strip() for line in block.splitlines()) + "\n" for block in found]


def inline(start: str) -> str:
    """A command of the README's text that begins so."""
    return re.search(rf"`({re.escape(start)}[^`]*)`", (ROOT / "README.md").read_text())[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as a user has it: the tools, a small model with its tokenizer, some text, the README's run.toml."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / "corpus").mkdir()
    sources = sorted((ROOT / "megatron_ligo").rglob("*.py"))
    for number, path in enumerate(sources):
        (folder / "corpus" / f"{number}.txt").write_text(path.read_text())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=301, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train([str(path) for path in sources[:5]], trainer)
    small = llama_dims(vocab_size=301, num_heads=6, num_kv_heads=3, tied=True)
    hf_llama(small).save_pretrained(folder / "models" / "small")
    tokenizer.save(str(folder / "models" / "small" / "tokenizer.json"))
    (folder / "models" / "small" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    (config,) = (block for block in blocks("toml") if "[large]" in block)
    for large, tiny in TINY.items():
        assert large in config, f"the README's run.toml no longer says {large!r}"
        config = config.replace(large, tiny)
    (folder / "run.toml").write_text(config)
    return folder


def run(command: str, place: Path, code: int = 0) -> str:
    words = shlex.split(command)
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(29000 + os.getpid() % 900)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def test_the_journey_of_the_readme(place):
    assert "llama" in run(inline("python tools/inspect_checkpoint.py"), place)
    run(inline("python tools/prepare_data.py"), place)
    (commands,) = (block for block in blocks("bash") if "tools/fit.py" in block)
    fit, grow, pretrain, report = commands.strip().splitlines()
    run(fit, place)
    run(grow, place)
    told = run(pretrain, place)
    run(report, place)

    record = json.loads((place / "runs/fit/operator/operator.json").read_text())
    assert record["layout"] == {"tp": 2, "pp": 2, "dp": 1, "zero": 1}
    losses = json.loads((place / "runs/pretrain/pretrain.json").read_text())["losses"]
    assert losses["start_on_fit_batch"] == pytest.approx(record["losses"]["end"], rel=1e-5), told
    assert (place / "runs/report/report.html").stat().st_size > 10_000
    assert (place / "runs/report/report.png").is_file()

    run("python tools/verify.py runs/grown/hf runs/grown/universal", place)
    run("python tools/convert.py runs/grown/universal runs/back --to hf", place)
    run("python tools/verify.py runs/back runs/grown/hf", place)
    # Started again, a finished fit finds itself finished; with other settings it refuses, on every rank.
    assert "resumed after step 4" in run(fit, place)
    assert "fit.seed" in run(f"{fit} --set fit.seed=7", place, code=2)


def test_the_commands_explain_themselves(place):
    tools = sorted((ROOT / "tools").glob("*.py"))
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda tool: run(f"python tools/{tool.name} --help", place), tools))
    assert len(tools) > 10
    for tool, text in zip(tools, told, strict=True):
        assert "example" in text, tool
