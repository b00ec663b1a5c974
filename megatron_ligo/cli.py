"""What every command shares: its options and --help, its log, and how faults become messages and exit codes.

Exit codes: 0 success, 2 a fault of input or of the machine (one message, no traceback), 130 and 143 an end by SIGINT
and SIGTERM (a run under way has saved first), 1 our own mistake (with its traceback).
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from megatron_ligo.common import signal_handling
from megatron_ligo.common.errors import LigoError, user_message
from megatron_ligo.config import typed_toml
from megatron_ligo.config.run_config import RunConfig

# A launcher ends all processes at the first that fails: the others give rank 0 this long to say why.
RANK_0_GRACE_SECONDS = 5.0


class CommandParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse does it, but said once and not by every process."""
        if launcher_rank() == 0:
            super().error(message)
        _wait_for_rank_0()
        sys.exit(2)


def launcher_rank() -> int:
    """This process's number under a launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def build_parser(
    description: str, example: str, sections: Sequence[str] = (), output: str = "", own: Mapping[str, type] = {}
) -> CommandParser:
    """A command's parser: its own help, an example, and with `sections` the options --config and --set.

    output: what is written there, if the command writes a folder (then --output DIR is required). own: sections that
    only this command's file has.
    """
    plain = argparse.RawDescriptionHelpFormatter
    made = CommandParser(description=description, epilog=_format_epilog(example, sections, own), formatter_class=plain)
    if sections:
        made.add_argument("--config", metavar="RUN.toml", help="settings of the run (TOML)")
        made.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="put over the file; repeatable"
        )
    if output:
        made.add_argument("--output", required=True, metavar="DIR", help=output)
    # The launcher appends it; the environment says the same.
    made.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return made


def load_config(args: argparse.Namespace) -> RunConfig:
    """The config that --config and --set describe."""
    return RunConfig.load(args.config, args.set)


def _format_epilog(example: str, sections: Sequence[str], own: Mapping[str, type]) -> str:
    lines = ["example:", *(f"  {line}" for line in example.strip().splitlines())]
    known = typed_toml.field_types(RunConfig)
    for name, section in {**own, **{name: known[name] for name in sections}}.items():
        lines += ["", f"[{name}]"]
        for key, field, hint in typed_toml.iterate_settings(section):
            lines.append(f"  {key} = {_format_default(field.default)}")
            choices = field.metadata["limits"]["choices"]
            kind = " | ".join(map(str, choices)) if choices else typed_toml.describe_type(hint)
            lines.append(f"      {field.metadata['help']} ({kind})")
    # argparse formats the epilog with %.
    return "\n".join(lines).replace("%", "%%")


def _format_default(value: object) -> str:
    if value is None:
        return "(left out)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_format_default, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@contextmanager
def byte_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on rank 0's terminal; gives the function that is told (bytes done, bytes in all)."""
    hidden = launcher_rank() != 0 or not sys.stderr.isatty()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def set_up_logging() -> None:
    """Plain lines on stderr, from rank 0; warnings and worse from the libraries."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    # Megatron-core says so four times over in each process; nothing here asks for either.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message="Apex is not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use")
    logging.getLogger("megatron_ligo").setLevel(logging.INFO if launcher_rank() == 0 else logging.ERROR)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    set_up_logging()
    signal_handling.install_handlers()
    threading.excepthook = _report_thread_failure
    try:
        main()
        sys.stdout.flush()
    except signal_handling.Interrupted as error:
        _report_error(f"{error}: ended.", agreed=True)
        signal_handling.exit_process(error.exit_code)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            _exit_on_broken_pipe()
        text = user_message(error)
        if text is None:
            raise
        _report_error(text, agreed=isinstance(error, LigoError) and error.agreed)
        signal_handling.exit_process(error.exit_code if isinstance(error, LigoError) else LigoError.exit_code)
    signal_handling.exit_process(0)


def _report_thread_failure(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer, which meets a full disk first: whoever uses it hears of it as well."""
    if failed.exc_value is None or user_message(failed.exc_value) is None:
        threading.__excepthook__(failed)


def _is_stdout_closed() -> bool:
    watch = select.poll()
    watch.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _exit_on_broken_pipe() -> NoReturn:
    """Whoever reads our output has enough of it (`| head`): no fault of anybody's, and nothing to tell."""
    # What is still in the buffer would be written at the end, and fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def _report_error(text: str, agreed: bool) -> None:
    """Rank 0 speaks. Another rank does if rank 0 had time to and the run goes on: then its fault is its own."""
    if launcher_rank() == 0:
        print(text, file=sys.stderr, flush=True)
        return
    asked = _wait_for_rank_0()
    if not agreed and not asked:
        print(f"rank {launcher_rank()}: {text}", file=sys.stderr, flush=True)


def _wait_for_rank_0() -> bool:
    """Until the launcher, which has seen another rank end, asks this one to (True), or time is over."""
    deadline = time.monotonic() + RANK_0_GRACE_SECONDS
    with signal_handling.defer_signals(2 * RANK_0_GRACE_SECONDS):
        while time.monotonic() < deadline and not signal_handling.received_signal():
            time.sleep(0.1)
        return signal_handling.received_signal() is not None
