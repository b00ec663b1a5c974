"""Runs the README's commands verbatim on tiny sizes, from text to the report, with the real launcher and real files."""

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

from tests.tiny_models import hf_llama, llama_config

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).resolve().parents[1]
# Seconds for one command. Alone it takes twenty; a machine that others keep busy may need ten times as long.
LIMIT = 1200
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
TINY_COMPARISON = {
    "scratch_steps = 1000": "scratch_steps = 8",
    "budgets = [0.25, 0.5]": "budgets = [1.0]",
    "lrs = [5e-4, 1e-3, 2e-3]": "lrs = [1e-3]",
    "seeds = [1, 2, 3]": "seeds = [1]",
}
TINY_PYTHON = {
    "num_layers=32": "num_layers=5",
    "hidden_size=768": "hidden_size=32",
    "ffn_size=2048": "ffn_size=48",
    "num_heads=12": "num_heads=8",
    "num_kv_heads=4": "num_kv_heads=4",
    '"data.seq_length": 1024': '"data.seq_length": 16',
    "steps=100": "steps=2",
}


def find_blocks(language: str) -> list[str]:
    """Returns the README's fenced code blocks of a language."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.M | re.S)
    return ["\n".join(line.strip() for line in block.splitlines()) + "\n" for block in blocks]


def find_inline(start: str) -> str:
    """Returns the README's inline command that begins with `start`."""
    return re.search(rf"`({re.escape(start)}[^`]*)`", (ROOT / "README.md").read_text())[1]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A user's folder: the tools, a small model with its tokenizer, some text, the README's run.toml."""
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
    small = llama_config(vocab_size=301, num_heads=6, num_kv_heads=3, tied=True)
    hf_llama(small).save_pretrained(folder / "models" / "small")
    tokenizer.save(str(folder / "models" / "small" / "tokenizer.json"))
    (folder / "models" / "small" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    (config,) = (block for block in find_blocks("toml") if "[large]" in block)
    for large, tiny in TINY.items():
        assert large in config, f"the README's run.toml no longer says {large!r}"
        config = config.replace(large, tiny)
    (folder / "run.toml").write_text(config)
    return folder


def run(command: str, workspace: Path, code: int = 0) -> str:
    words = shlex.split(command)
    # Groups of one process that other tests have made are in the environment.
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment = {**inherited, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert completed.returncode == code, f"{command}\n{completed.stdout[-3000:]}\n{completed.stderr[-6000:]}"
    return completed.stdout + completed.stderr


def prepare_texts(workspace: Path) -> None:
    if not (workspace / "runs/data/train.idx").is_file():
        run(find_inline("ligo prepare"), workspace)


@pytest.mark.timeout(3600)
def test_the_commands_of_the_readme(workspace):
    assert "llama" in run(find_inline("ligo inspect"), workspace)
    run(find_inline("ligo prepare"), workspace)
    (commands,) = (block for block in find_blocks("bash") if "ligo fit" in block)
    fit, grow, pretrain, report = commands.strip().splitlines()
    run(fit, workspace)
    run(grow, workspace)
    output = run(pretrain, workspace)
    assert "wrote runs/pretrain; next: ligo report runs/pretrain --output runs/report" in output
    run(report, workspace)

    record = json.loads((workspace / "runs/fit/operator/operator.json").read_text())
    assert record["layout"] == {"tp": 2, "pp": 2, "dp": 1, "zero": 1}
    losses = json.loads((workspace / "runs/pretrain/pretrain.json").read_text())["losses"]
    assert losses["start_on_fit_batch"] == pytest.approx(record["losses"]["end"], rel=1e-5), output
    assert (workspace / "runs/report/report.html").stat().st_size > 10_000
    assert (workspace / "runs/report/report.png").is_file()

    run("ligo verify runs/grown/hf runs/grown/universal", workspace)
    run("ligo convert runs/grown/universal runs/back --to hf", workspace)
    run("ligo verify runs/back runs/grown/hf", workspace)
    run(find_inline("ligo convert runs/pretrain"), workspace)
    assert (workspace / "models/large/tokenizer.json").read_bytes() == (
        workspace / "models/small/tokenizer.json"
    ).read_bytes()
    # A finished fit reports that it is finished. With other settings it refuses, on every rank.
    assert "resumed after step 4" in run(fit, workspace)
    assert "fit.seed" in run(f"{fit} --set fit.seed=7", workspace, code=2)


@pytest.mark.timeout(3600)
def test_the_comparison_of_the_readme(workspace):
    prepare_texts(workspace)
    (arms,) = (block for block in find_blocks("toml") if "[compare]" in block)
    for large, tiny in TINY_COMPARISON.items():
        assert large in arms, f"the README's comparison no longer says {large!r}"
        arms = arms.replace(large, tiny)
    (workspace / "compare.toml").write_text((workspace / "run.toml").read_text() + arms)
    output = run(find_inline("ligo compare --config"), workspace)
    assert "runs/compare/results.json, compare.html and compare.png; next:" in output
    record = json.loads((workspace / "runs/compare/results.json").read_text())
    assert set(record["arms"]) == {"scratch", "corner", "lossless", "small"}
    (trained,) = (workspace / "runs/compare/jobs/corner/seed_1").glob("run_*/run/pretrain.json")
    assert json.loads(trained.read_text())["layout"]["tp"] == 2


@pytest.mark.timeout(3600)
def test_the_python_of_the_readme(workspace):
    prepare_texts(workspace)
    (code,) = (block for block in find_blocks("python") if "ligo.fit" in block)
    for large, tiny in TINY_PYTHON.items():
        assert large in code, f"the README's Python no longer says {large!r}"
        code = code.replace(large, tiny)
    (workspace / "example.py").write_text(code)
    output = run("python example.py", workspace)
    assert "True {" in output and "pretraining" in output and (workspace / "out/model.safetensors").is_file()


def test_every_command_has_help_with_an_example(workspace):
    tools = sorted((ROOT / "tools").glob("*.py"))
    with ThreadPoolExecutor(2) as pool:
        helps = list(pool.map(lambda tool: run(f"python tools/{tool.name} --help", workspace), tools))
    assert len(tools) > 10
    for tool, text in zip(tools, helps, strict=True):
        assert "example" in text, tool
