import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, MachineError, user_message
from megatron_ligo.distributed.rank_failures import report_failures

ROOT = Path(__file__).resolve().parents[1]


def write_script(tmp_path: Path, body: str) -> Path:
    """Writes a command whose main() has the given body."""
    script = tmp_path / "command.py"
    head = (
        "import logging, time\nfrom megatron_ligo import cli\nfrom megatron_ligo.common import errors\n\ndef main():\n"
    )
    script.write_text(
        head
        + textwrap.indent(textwrap.dedent(body), "    ")
        + '\nif __name__ == "__main__":\n    cli.run_command(main)\n'
    )
    return script


def start(script: Path, *args: str, **env: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen([sys.executable, script, *args], env=env, text=True, stdout=-1, stderr=-1)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for a process; returns its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


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


# On a busy machine a process may need long to end: only a test of that limit shortens it.
PATIENT = (
    "from megatron_ligo.common import signal_handling; signal_handling.EXIT_SECONDS = {seconds}; "
    "print('ready', flush=True); "
)
INTERRUPTIBLE = "time.sleep(160)"
# A mutex that is locked twice: a C call that no Python signal handler interrupts.
UNINTERRUPTIBLE = (
    "import ctypes; mutex = ctypes.create_string_buffer(64); "
    "[ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"
)


def await_sleep(process: subprocess.Popen) -> None:
    """Waits until a process that has said that it is ready sleeps in a system call, however busy the machine is."""
    assert process.stdout.readline() == "ready\n"
    main_thread = Path(f"/proc/{process.pid}/task/{process.pid}/stat")
    asleep = 0
    while asleep < 4:
        state = main_thread.read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.05)


def test_an_interrupt_exits_with_130(tmp_path):
    process = start(write_script(tmp_path, PATIENT.format(seconds=150) + INTERRUPTIBLE))
    await_sleep(process)
    process.send_signal(2)
    code, _, err = finish(process)
    assert code == 130 and err == "SIGINT: ended.\n"


def test_only_rank_0_reports_an_agreed_error(tmp_path):
    body = "error = errors.ConfigError('wrong'); error.agreed = True; raise error"
    ranks = [start(write_script(tmp_path, body), RANK=str(rank)) for rank in range(2)]
    assert [finish(process) for process in ranks] == [(2, "", "wrong\n"), (2, "", "")]


def test_a_rank_reports_an_error_of_its_own(tmp_path):
    start_time = time.monotonic()
    script = write_script(tmp_path, "raise errors.LayoutError('wrong')")
    assert finish(start(script, RANK="3")) == (2, "", "rank 3: wrong\n")
    assert time.monotonic() - start_time < 30


@pytest.mark.parametrize(
    ("work", "seconds", "message"),
    [(INTERRUPTIBLE, 150, "SIGTERM: ended."), (UNINTERRUPTIBLE, 0.5, "SIGTERM: not done within 0.5 s")],
)
def test_sigterm_exits_with_143(tmp_path, work, seconds, message):
    process = start(write_script(tmp_path, PATIENT.format(seconds=seconds) + work))
    await_sleep(process)
    process.terminate()
    code, _, err = finish(process)
    assert code == 143 and err.startswith(message) and err.count("\n") == 1


def test_a_command_outlives_the_runs_that_it_has_started(tmp_path):
    """A run may save for longer than its command would have to exit."""
    run = "import signal, time; signal.signal(15, lambda *_: (time.sleep(3), print('saved'), exit(0))); time.sleep(160)"
    work = f"""
import subprocess, sys
run = subprocess.Popen([sys.executable, "-c", {run!r}])
time.sleep(2)
with signal_handling.wait_for_child_runs():
    try:
        {PATIENT.format(seconds=0.5)}
        run.wait()
    finally:
        run.terminate()
        run.wait()
"""
    process = start(write_script(tmp_path, "from megatron_ligo.common import signal_handling" + work))
    await_sleep(process)
    process.terminate()
    assert finish(process) == (143, "saved\n", "SIGTERM: ended.\n")


# PR_SET_CHILD_SUBREAPER: orphans below this process become its children, as under systemd and Slurm.
ADOPTING_SUPERVISOR = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
subprocess.run([sys.executable, "-c", sys.argv[1]], start_new_session=True, check=True)
os.wait()
"""


@pytest.mark.parametrize("adopter", ["process 1", "a supervisor"])
def test_a_rank_whose_launcher_died_before_it_had_started_ends(tmp_path, adopter):
    """It ends as SIGTERM would end it, for no later signal can reach it."""
    ended = tmp_path / "ended"
    body = f"import sys; sys.stderr = open({str(ended)!r}, 'w', buffering=1); time.sleep(60)"
    script = write_script(tmp_path, body)
    script.write_text(
        "import os, time\nwhile os.getppid() == int(os.environ['LAUNCHER']):\n    time.sleep(0.05)\n"
        + script.read_text()
    )
    launcher = (
        "import os, subprocess, sys; env = {**os.environ, 'LAUNCHER': str(os.getpid())}; "
        f"subprocess.Popen([sys.executable, {str(script)!r}, '--local_rank=0'], env=env)"
    )
    code = [launcher] if adopter == "process 1" else [ADOPTING_SUPERVISOR, launcher]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    subprocess.run([sys.executable, "-c", *code], env=env, timeout=200, check=True)
    deadline = time.monotonic() + 60
    while not (ended.is_file() and ended.read_text() == "SIGTERM: ended.\n") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ended.read_text() == "SIGTERM: ended.\n"


@pytest.mark.parametrize("leads_session", [False, True])
def test_a_rank_of_a_living_launcher_runs(tmp_path, leads_session):
    """Also one that the launcher has put into a session of its own, as torchrun does."""
    script = write_script(tmp_path, "time.sleep(2.5); print('done')")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    command = [sys.executable, script, "--local_rank=0"]
    done = subprocess.run(
        command, env=env, timeout=200, capture_output=True, text=True, start_new_session=leads_session
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


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


def test_a_closed_terminal_ends_like_sigterm(tmp_path):
    """Unless `nohup` has had it ignored."""
    process = start(write_script(tmp_path, "print('ready', flush=True); time.sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert finish(process)[::2] == (129, "SIGHUP: ended.\n")
    body = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["nohup", sys.executable, write_script(tmp_path, body)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_forked_children_have_default_signal_handlers(tmp_path):
    """A terminated child ends, and its parent does not."""
    body = """
        import multiprocessing
        from megatron_ligo.common import signal_handling
        signal_handling.EXIT_SECONDS = 0.5
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.5)
        child.terminate()
        child.join()
        time.sleep(2)
        print(child.exitcode)
    """
    assert finish(start(write_script(tmp_path, body))) == (0, "-15\n", "")


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
