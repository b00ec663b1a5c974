"""What all commands share: argument parsing, --help, logging, error reporting and exit codes.

Exit codes: 0 success; 1 a bug, with its traceback; 2 an error of the input or the machine, with one message and no
traceback; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM, on which a training run first saves.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from megatron_ligo.common import hub_models, library_log, signal_handling, terminal_stream
from megatron_ligo.common.errors import CheckpointError, ConfigError, LigoError, Problem, user_message
from megatron_ligo.config import typed_toml
from megatron_ligo.config.run_config import RunConfig

Number = TypeVar("Number", int, float)

# The launcher kills all ranks when the first one fails. The others wait this long, so that rank 0 reports the error.
RANK_0_GRACE_SECONDS = 5.0


class CommandParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with usage and message, printed by rank 0 alone."""
        if launcher_rank() == 0:
            super().error(message)
        _wait_for_rank_0()
        sys.exit(2)


def add_accept_option(parser: CommandParser) -> None:
    """Adds --accept KEY, which lets an unknown key of the source's config through, by name."""
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="KEY",
        help="let one key of the source's config through that this program does not know; repeatable, recorded",
    )


def launcher_rank() -> int:
    """Returns this process's rank under a launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def build_parser(
    description: str,
    example: str,
    sections: Sequence[str] = (),
    output: str = "",
    extra_sections: Mapping[str, type] = {},
    prog: str | None = None,
) -> CommandParser:
    """Builds a command's parser: its description, an example, and with `sections` the options --config and --set.

    output: help of the required option --output DIR, for a command that writes a folder. extra_sections: config
    sections of this command alone; --help lists their keys first. prog: the command's name; None: the script's.
    """
    parser = CommandParser(
        prog=prog,
        description=description,
        epilog=_format_epilog(example, sections, extra_sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if sections:
        parser.add_argument("--config", metavar="RUN.toml", help="config file of the run (TOML); its keys are below")
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            help="override one key of the config file; repeatable",
        )
    if output:
        parser.add_argument("--output", required=True, metavar="DIR", help=output)
    # The launcher appends it. Ignored: the environment has the same value.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """Returns an argparse type: a finite number of this kind above 0."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def let_waiting_threads_sleep() -> None:
    """Has torch's waiting threads sleep instead of spinning on the cores that other threads need to hash and write.

    Unless the user has chosen. To be called before torch is imported, which reads it once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def load_config(args: argparse.Namespace) -> RunConfig:
    """Loads the config from --config and --set."""
    return RunConfig.load(args.config, args.set)


def print_next(wrote: object, *command: object) -> None:
    """Prints what a command has written, if anything, and the command that follows, on rank 0."""
    print_wrote(wrote, shlex.join(map(str, command)))


def print_wrote(wrote: object, then: str) -> None:
    """Prints what a command has written, if anything, and what to do next in words, on rank 0."""
    if launcher_rank() == 0:
        print(f"wrote {wrote}; next: {then}" if wrote else f"next: {then}")


def config_options(args: argparse.Namespace) -> list[str]:
    """Returns --config and --set as they were given, for the command that follows."""
    return [*(["--config", args.config] if args.config else []), *(f"--set={text}" for text in args.set)]


def check_paths(*paths: str | None) -> None:
    """Raises CheckpointError if a checkpoint's path does not exist, before torch is imported."""
    for path in filter(None, paths):
        if not Path(path).exists() and not hub_models.is_hub_name(path):
            raise CheckpointError(hub_models.missing_path(path))


def _format_epilog(example: str, sections: Sequence[str], extra_sections: Mapping[str, type]) -> str:
    """Formats the example and every config key with its default, meaning and type."""
    lines = ["example:", *(f"  {line}" for line in example.strip().splitlines())]
    run_sections = typed_toml.field_types(RunConfig)
    listed = {**extra_sections, **{name: run_sections[name] for name in sections}}
    if listed:
        lines += ["", "config keys (KEY = DEFAULT; set them in the file or with --set SECTION.KEY=VALUE):"]
    for name, section in listed.items():
        lines += ["", f"[{name}]"]
        for key, field, field_type in typed_toml.iterate_settings(section):
            lines.append(f"  {key} = {_format_default(field.default)}")
            choices = field.metadata["limits"]["choices"]
            values = " | ".join(map(str, choices)) if choices else typed_toml.describe_type(field_type)
            lines.append(f"      {field.metadata['help']} ({values})")
    # argparse %-formats the epilog.
    return "\n".join(lines).replace("%", "%%")


def _format_default(value: object) -> str:
    if value is None:
        return "(unset)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_format_default, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@contextmanager
def byte_progress() -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on rank 0's terminal; yields its update function (bytes done, bytes in total)."""
    # Imported late, to keep --help fast.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    hidden = launcher_rank() != 0 or not sys.stderr.isatty()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(file=terminal_stream.raw_stream(sys.stderr))
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def set_up_logging() -> None:
    """Logs plain lines to stderr: the package's from rank 0, errors from any rank. Libraries' go to the run's log."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    library_log.install()
    logging.getLogger("megatron_ligo").setLevel(logging.INFO if launcher_rank() == 0 else logging.ERROR)
    # A command that tries many starts would repeat what it says of the models.
    said: set[str] = set()
    logging.getLogger("megatron_ligo.growth.validation").addFilter(lambda record: not _is_repeated(record, said))


def _is_repeated(record: logging.LogRecord, said: set[str]) -> bool:
    text = record.getMessage()
    repeated = text in said
    said.add(text)
    return repeated


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    terminal_stream.install()
    set_up_logging()
    signal_handling.install_handlers()
    threading.excepthook = _report_thread_failure
    try:
        _check_arguments()
        main()
        sys.stdout.flush()
    except signal_handling.Interrupted as error:
        _report_error(f"{error}: ended.", agreed=True)
        signal_handling.exit_process(error.exit_code)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            _exit_on_broken_pipe()
        message = user_message(error)
        if message is None:
            print(*library_log.kept_lines(), sep="\n", file=sys.stderr)
            raise
        _report_error(message, agreed=isinstance(error, LigoError) and error.agreed)
        signal_handling.exit_process(error.exit_code if isinstance(error, LigoError) else LigoError.exit_code)
    signal_handling.exit_process(0)


def _check_arguments() -> None:
    """Raises ConfigError for an argument that is no text: records and libraries' files could not name such a path.

    And for an empty one: as a path it would be the current folder.
    """
    for argument in sys.argv[1:]:
        if not argument or re.fullmatch(r"--[a-z-]+=", argument):
            hint = "Is a variable of the shell unset? Leave the option out for its default."
            raise ConfigError(Problem(f"argument {argument!r}", "a value", "an empty text", hint))
        if any("\ud800" <= character <= "\udfff" for character in argument):
            hint = "Rename the file or folder, or set a UTF-8 locale (LC_ALL=C.UTF-8)."
            raise ConfigError(Problem(f"argument {argument!r}", "text in UTF-8", "other bytes", hint))


def _report_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Prints a thread's traceback, except for errors of the machine.

    TensorBoard's writer thread hits a full disk first; the thread that uses it then raises the same error.
    """
    if failure.exc_value is None or user_message(failure.exc_value) is None:
        threading.__excepthook__(failure)


def _is_stdout_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _exit_on_broken_pipe() -> NoReturn:
    """Exits silently, as a shell expects when the reader of a pipe has closed it (`| head`)."""
    # Otherwise the exit flushes the rest of the buffer and fails again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def _report_error(message: str, agreed: bool) -> None:
    """Prints an error once. Rank 0 always prints; another rank prints only an error of its own.

    An error is its own if the ranks did not agree on it and the launcher does not end the rank while it waits.
    """
    if launcher_rank() == 0:
        print(message, file=sys.stderr, flush=True)
        return
    terminated = _wait_for_rank_0()
    if not agreed and not terminated:
        print(f"rank {launcher_rank()}: {message}", file=sys.stderr, flush=True)


def _wait_for_rank_0() -> bool:
    """Waits for the launcher's signal, which follows the exit of another rank. Returns False on timeout."""
    deadline = time.monotonic() + RANK_0_GRACE_SECONDS
    with signal_handling.defer_signals(2 * RANK_0_GRACE_SECONDS):
        while time.monotonic() < deadline and not signal_handling.received_signal():
            time.sleep(0.1)
        return signal_handling.received_signal() is not None
