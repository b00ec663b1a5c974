import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, MachineError, user_message
from megatron_ligo.distributed.rank_failures import report_failures
from tests.common.command_processes import ROOT, finish, start, write_script


def test_a_user_error_is_one_message_and_exit_code_2(tmp_path):
    script = write_script(tmp_path, "raise errors.ConfigError('a: expected b, found c. Do d.')")
    assert finish(start(script)) == (2, "", "a: expected b, found c. Do d.\n")


def test_a_bug_keeps_its_traceback(tmp_path):
    code, _, err = finish(start(write_script(tmp_path, "assert False, 'a bug'")))
    assert code == 1 and "Traceback" in err and "a bug" in err


def test_success_and_logging(tmp_path):
    body = "logging.getLogger('megatron_ligo.x').info('plain'); logging.getLogger('other').info('noise'); print('done')"
    # What growth says of a pair of models is said once, by a command that builds many starts too.
    body += "\nfor _ in range(3): logging.getLogger('megatron_ligo.growth.validation').info('of a pair')"
    script = write_script(tmp_path, body)
    assert finish(start(script)) == (0, "done\n", "plain\nof a pair\n")
    assert finish(start(script, RANK="1")) == (0, "done\n", "")


def test_only_rank_0_reports_an_agreed_error(tmp_path):
    body = "error = errors.ConfigError('wrong'); error.agreed = True; raise error"
    ranks = [start(write_script(tmp_path, body), RANK=str(rank)) for rank in range(2)]
    assert [finish(process) for process in ranks] == [(2, "", "wrong\n"), (2, "", "")]


def test_a_rank_reports_an_error_of_its_own(tmp_path):
    start_time = time.monotonic()
    script = write_script(tmp_path, "raise errors.LayoutError('wrong')")
    assert finish(start(script, RANK="3")) == (2, "", "rank 3: wrong\n")
    assert time.monotonic() - start_time < 30


def test_a_warning_of_a_library_ends_no_command(tmp_path):
    script = write_script(tmp_path, "import warnings; warnings.warn('a part is missing'); print('done')")
    assert finish(start(script, PYTHONWARNINGS="error")) == (0, "done\n", "")


def test_closed_descriptors_are_no_files_of_ours(tmp_path):
    """The output of a library would go into the first file that is opened."""
    file = tmp_path / "file"
    body = f"""
        import os
        file = open({str(file)!r}, "w")
        for number in (1, 2):
            os.write(number, b"noise")
        file.write(str(file.fileno()))
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, str(write_script(tmp_path, body))]
    assert subprocess.run(words, env=env, timeout=200, check=False).returncode == 0
    assert int(file.read_text()) > 2


def test_a_closed_pipe_is_no_error(tmp_path):
    process = start(write_script(tmp_path, "for number in range(100_000): print(number)"))
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141 and err == ""


def test_a_full_disk_is_reported(tmp_path):
    """/dev/full fails every write with ENOSPC."""
    code, _, err = finish(start(write_script(tmp_path, "open('/dev/full', 'w').write('x' * 100000)")))
    assert code == 2 and "full" in err and "Traceback" not in err


def wrap(inner: Exception) -> Exception:
    """Raises an error from another, as libraries do."""
    try:
        try:
            raise inner
        except Exception as error:
            raise RuntimeError("a library's own message") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "where", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: ", "full"),
        (wrap(OSError(errno.ENOSPC, "No space left on device")), "writing: ", "full"),
        (OSError(errno.EFBIG, "File too large", "/a/b"), "/a/b: ", "ulimit -f"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "writing: ", "full"),
        (RuntimeError("[enforce fail at socket.cc:24] socket: Too many open files"), "writing: ", "ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: ", "Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), "/a: ", "No such file or directory"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: ", "expected a file, found a folder"),
        (FileExistsError(errno.EEXIST, "File exists", "/a"), "/a: ", "File exists"),
        (OSError(errno.EIO, "Input/output error", "/a"), "/a: ", "Input/output error"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "the launcher's port: ", "--master_port"),
        (ConfigError("a message"), "a message", ""),
        (ModuleNotFoundError("none", name="megatron.core"), "module megatron.core: ", "pip install megatron-core"),
    ],
)
def test_messages_of_user_and_machine_errors(error, where, part):
    message = user_message(error)
    assert message.startswith(where) and part in message


@pytest.mark.parametrize("bug", [KeyError, IndexError, TypeError, AttributeError, AssertionError, NameError])
def test_a_bug_while_a_users_error_is_handled_stays_a_bug(bug):
    def fail() -> None:
        try:
            Path("/nowhere").read_text()
        except FileNotFoundError:
            raise bug("ours")  # noqa: B904 - as a mistake does it

    with pytest.raises(bug) as raised:
        fail()
    assert user_message(raised.value) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_names_what_to_set(error):
    message = user_message(error)
    assert all(part in message for part in ("recompute", "micro_batch_size", "parallel.tp")) and "\n" not in message
    with pytest.raises(MachineError, match="micro_batch_size"), report_failures():
        raise error


@pytest.mark.parametrize("option", ["--world=0", "--world=-1", "--device-memory=0", "--tflops=nan", "--world=x"])
def test_counts_and_sizes_are_above_0(option):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/plan.py", option],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and option.split("=")[0] in done.stderr


def test_bugs_have_no_message():
    assert user_message(ModuleNotFoundError("none", name="megatron_ligo.nowhere")) is None
    assert user_message(KeyError("x")) is None and user_message(OSError("x")) is None


def test_help_lists_the_config_keys(capsys):
    parser = cli.build_parser(
        "Fits 100% of it.", "deepspeed tools/fit.py --config run.toml", ("fit",), output="the run"
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for part in ("100%", "tools/fit.py --config run.toml", "[fit]", "parallel.tp = 1", "betas = [0.9, 0.95]"):
        assert part in text
    assert "depth_lr = 0.0001" in text and "max_flops = (unset)" in text
    assert "adamw | sgd" in text and "[pretrain]" not in text and "--output" in text


def test_config_options(tmp_path):
    parser = cli.build_parser("d", "e", ("fit",), output="the run")
    args = parser.parse_args(
        ["--set", "fit.steps=3", "--output", "x", "--set=fit.lr=0.5", "--local_rank=2", "--config", str(tmp_path / "r")]
    )
    (tmp_path / "r").write_text("[fit]\nsteps = 9\nclip = 2.0\n")
    config = cli.load_config(args)
    assert (config.fit.steps, config.fit.lr, config.fit.clip, args.output) == (3, 0.5, 2.0, "x")
    assert vars(cli.build_parser("d", "e").parse_args(["--local_rank=0"])) == {"local_rank": 0}


def test_unknown_options_are_reported_once(tmp_path):
    script = write_script(tmp_path, "cli.build_parser('d', 'e').parse_args()")
    ranks = [start(script, "--nonsense", RANK=str(rank)) for rank in range(2)]
    (code0, _, err0), (code1, _, err1) = map(finish, ranks)
    assert (code0, code1, err1) == (2, 2, "") and "--nonsense" in err0


def test_logging_is_quiet_on_other_ranks(monkeypatch):
    logger = logging.getLogger("megatron_ligo")
    level_before = logger.level
    monkeypatch.setenv("RANK", "1")
    cli.set_up_logging()
    assert logger.level == logging.ERROR
    logger.setLevel(level_before)
