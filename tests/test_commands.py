"""Every subcommand of `ligo`: help without heavy imports, refusals, the scripts in tools/, completion, processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_ligo import commands
from megatron_ligo.commands import completion
from megatron_ligo.common import library_log
from megatron_ligo.config.run_config import ParallelSection
from tests.tiny_models import hf_llama, llama_config

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "deepspeed", "megatron", "rich", "numpy", "safetensors", "matplotlib")
# The scripts whose names differ from their commands'.
SCRIPTS = {"inspect": "inspect_checkpoint", "prepare": "prepare_data", "prepare-images": "prepare_images"}
WITHOUT_SCRIPT = ("completion", "hosts", "init", "schema")


def own_environment() -> dict[str, str]:
    """Returns the environment without the group of one process that other tests leave there."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def ligo(*words: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_ligo", *map(str, words)]
    environment = {**own_environment(), "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_help_imports_nothing_heavy():
    """All in one process: what the first imports, none of the others may hide."""
    code = f"""
import contextlib, io, sys
from megatron_ligo import commands
for name in commands.SUBCOMMANDS:
    parser = commands.load(name).build_parser(f"ligo {{name}}")
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        parser.parse_args(["--help"])
    assert "example" in text.getvalue() and f"usage: ligo {{name}}" in text.getvalue(), name
    loaded = [module for module in {HEAVY} if module in sys.modules]
    assert not loaded, f"{{name}}: {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command():
    done = ligo("--help")
    assert done.returncode == 0
    for name, command in commands.SUBCOMMANDS.items():
        assert f"  {name} " in done.stdout and command.summary in done.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fitt"], "Did you mean 'fit'?"),
        (["--local_rank=0", "fit", "--config", "nowhere.toml", "--output", "x"], "no such file"),
        (["fit", "--processes", "2", "--config", "nowhere.toml", "--output", "x"], "no such file"),
        (["fit", "--config", ".", "--output", "x"], "config .: expected a TOML file, found a folder. Check --config."),
        (["convert", "nowhere", "x", "--to", "hf"], "nothing there"),
        (["convert", ".", "x", "--to", "hff"], "Did you mean 'hf'?"),
        (["verify", "nowhere"], "nothing there"),
        (["eval", "a=.", "--text", "nowhere", "--output", "x"], "nowhere: expected a text, found nothing there"),
        (["init", "a\udcff", "--to", "1M"], r"argument 'a\udcff': expected text in UTF-8"),
    ],
)
def test_refusals_come_before_heavy_imports(words, part, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = ligo(*words, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2 and part in done.stderr, done.stderr


def test_every_command_has_a_script():
    scripts = {path.stem: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    names = [name for name in commands.SUBCOMMANDS if name not in WITHOUT_SCRIPT]
    assert sorted(scripts) == sorted(SCRIPTS.get(name, name) for name in names)
    for name in names:
        assert f'script_main("{name}")' in scripts[SCRIPTS.get(name, name)]


def test_every_command_says_what_follows():
    """Except where the answer is the end: a comparison, a number for a script, a script for a shell."""
    silent = [
        name
        for name in commands.SUBCOMMANDS
        if not re.search(r"\bprint_(next|wrote)", Path(commands.load(name).__file__).read_text())
    ]
    assert silent == ["verify", "hosts", "schema", "completion"]


def test_libraries_write_to_the_runs_log(tmp_path):
    """Their warnings, and what their own handlers would print; errors stay on the terminal."""
    script = tmp_path / "command.py"
    script.write_text(
        "import logging, sys, warnings\n"
        "from pathlib import Path\n"
        "from megatron_ligo import cli\n"
        "from megatron_ligo.common import library_log\n"
        "def main():\n"
        "    logger = logging.getLogger('library.part')\n"
        "    logger.addHandler(logging.StreamHandler(sys.stdout))\n"
        "    logger.warning('early'); warnings.warn('a habit')\n"
        "    if len(sys.argv) > 1: assert False, 'a bug'\n"
        "    library_log.write_to(Path(__file__).parent)\n"
        "    logger.warning('late'); logger.error('broken')\n"
        "    with library_log.log_prints('printer'): print('a topology')\n"
        "    logging.getLogger('megatron_ligo.x').info('ours')\n"
        "if __name__ == '__main__': cli.run_command(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, script, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    done = start()
    assert (done.returncode, done.stdout, done.stderr) == (0, "broken\n", "broken\nours\n")
    log = (tmp_path / library_log.FILE_NAME).read_text()
    assert (
        all(part in log for part in ("library.part WARNING: early", "a habit", "late", "a topology"))
        and "ours" not in log
    )
    bug = start("fail")
    assert bug.returncode == 1 and "early" in bug.stderr and "Traceback" in bug.stderr


def test_help_is_for_the_command_and_not_for_python():
    text = commands._build_parser().format_help()
    assert "Grow trained transformers" in text and "Python API" not in text


WITHOUT_RANKS = """
import sys
import sysconfig
from megatron_ligo import commands
from megatron_ligo.common.errors import user_message

def run(*words):
    module = commands.load(words[0])
    module.run(module.build_parser().parse_args(words[1:]))

run("plan", "--set=small.path=small", "--set=large.num_layers=3", "--set=data.seq_length=8")
run("init", "small", "--to", "40K", "--output", "run.toml")
run("grow", "--set=small.path=small", "--set=large.num_layers=3", "--output", "grown")
run("convert", "grown/hf", "mcore", "--to", "mcore")
for start in (lambda: run("fit", "--config", "run.toml", "--output", "fit"),
              lambda: commands._run_module("fit", None, ["--processes=2", "--config=run.toml", "--output=fit"])):
    try:
        start()
    except ModuleNotFoundError as error:
        print("MISSING", user_message(error))
if __name__ == "__main__":
    try:
        run("verify", "grown/hf", "mcore", "--logits")
    except SystemExit as end:
        print("VERIFIED", end.code)
"""


def test_without_megatron_core_and_deepspeed(tmp_path):
    """What needs neither works, and what does says which package is missing, in an environment that lacks both."""
    hf_llama(llama_config()).save_pretrained(tmp_path / "small")
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("deepspeed", "megatron")):
            (packages / path.name).symlink_to(path)
    (tmp_path / "script.py").write_text(WITHOUT_RANKS)
    environment = {**own_environment(), "PYTHONPATH": f"{ROOT}:{packages}"}
    command = [sys.executable, "-S", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    missing = [line for line in done.stdout.splitlines() if line.startswith("MISSING")]
    assert len(missing) == 2 and all("pip install deepspeed" in line for line in missing)
    assert "pretraining: tp 1" in done.stdout and "this program's reading" in done.stdout
    assert done.stdout.splitlines()[-1] == "VERIFIED 0"


def test_bash_completes_commands_options_and_keys():
    script = completion.build_parser().parse_args(["bash"])
    assert script.shell == "bash"

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        body = f"source <(cat); COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _ligo; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", body], input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    text = ligo("completion", "bash").stdout
    assert complete("ligo", "pr") == ["prepare", "prepare-images", "pretrain"]
    assert complete("ligo", "verify", "--log") == ["--logits"]
    assert complete("ligo", "fit", "--set", "fit.par") == [
        f"fit.parallel.{field.name}=" for field in fields(ParallelSection)
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_other_shells(shell):
    text = ligo("completion", shell).stdout
    assert all(name in text for name in commands.SUBCOMMANDS) and "fit.steps=" in text
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
