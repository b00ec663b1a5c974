"""Fuzzing of all readers, guided by the code that inputs reach (atheris), or by chance alone.

FOLDER/good, other     valid samples
FOLDER/corpus/TARGET   inputs that reached new code: a later call goes on from them
FOLDER/findings        inputs that did harm, one for each cause, with the traceback or figures
FOLDER/fuzz.json       inputs, CPU seconds and calls so far, by target
"""

from __future__ import annotations

import gc
import importlib.util
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.testing.fuzz.fuzz_targets import FuzzFinding, FuzzTarget, TargetTrial, list_targets, mutate_bytes
from megatron_ligo.testing.fuzz.sample_files import Sample
from megatron_ligo.testing.fuzz.trials import ALL_SAMPLES, GOOD, OTHER_NUMBERS, check_folder, write_sample

TALLY, CORPUS, FINDINGS, ENGINE_ERROR = "fuzz.json", "corpus", "findings", "engine.err"
OWN_NAMES = (TALLY, CORPUS, FINDINGS, ENGINE_ERROR, GOOD, OTHER_NUMBERS)
# Seconds of the CPU that one input may take, or by the clock with less use of the CPU than IDLE_CPU: then it hangs.
HANG_SECONDS, IDLE_SECONDS, IDLE_CPU = 60.0, 300.0, 0.05
# libFuzzer's own limits are by the clock, which a busy machine makes meaningless; 0 is one second to atheris.
NO_TIMEOUT = 10**6
# Memory for one input, beyond which the process is ended.
ADDRESS_SPACE = 4 << 30

# Tries inputs for some seconds of the CPU: (trial, try_input, the corpus, seconds, seed). It may end the process.
Engine = Callable[[TargetTrial, Callable[[bytes], None], Path, float, int], None]


@dataclass
class TargetTally:
    """inputs: number tried. cpu_seconds: of the processes that tried them."""

    inputs: int = 0
    cpu_seconds: float = 0.0
    calls: int = 0


def atheris_is_installed() -> bool:
    return importlib.util.find_spec("atheris") is not None


def run_guided_fuzz(
    folder: Path,
    minutes: float,
    seed: int,
    log_line: Callable[[str], None],
    engine: Engine | None = None,
    samples: Sequence[Sample] = ALL_SAMPLES,
) -> dict[str, TargetTally]:
    """Fuzzes every part of every file of the samples, an equal share of `minutes` of the CPU each.

    engine: None: atheris if it is installed, else chance. Returns the tally of all calls on this folder.
    CheckpointError at the end if the folder has findings, ConfigError for a folder of other things.
    """
    check_folder(folder, OWN_NAMES)
    engine = engine or (fuzz_by_coverage if atheris_is_installed() else fuzz_by_chance)
    if not (folder / GOOD).is_dir():
        for sample in samples:
            write_sample(sample, folder)
    targets = list_targets(folder / GOOD, samples)
    stated = read_json(folder / TALLY) if (folder / TALLY).is_file() else {}
    tally = {target.name: TargetTally(**stated.get(target.name, {})) for target in targets}
    random.Random(seed).shuffle(targets)
    seconds = 60 * minutes / len(targets)
    if engine is fuzz_by_coverage:
        _instrument()
    gc.freeze()
    log_line(f"{len(targets)} targets, {seconds:.1f} s each, {engine.__name__}")
    for target in targets:
        known = _list_findings(folder)
        _fuzz_in_child(target, folder, engine, seconds, seed, tally[target.name])
        write_json(folder / TALLY, {name: asdict(entry) for name, entry in tally.items()})
        for path in sorted(_list_findings(folder) - known):
            log_line(f"{path.name}: {path.read_text().splitlines()[-1]}")
    findings = sorted(path.name for path in _list_findings(folder))
    if findings:
        lines = "\n  ".join(findings)
        raise CheckpointError(f"{len(findings)} inputs did harm, in {folder / FINDINGS}\n  {lines}")
    return tally


def _list_findings(folder: Path) -> set[Path]:
    return set((folder / FINDINGS).glob("*.txt"))


def _fuzz_in_child(
    target: FuzzTarget, folder: Path, engine: Engine, seconds: float, seed: int, tally: TargetTally
) -> None:
    """Tries inputs in a child process: engines end theirs, and so may an input."""
    counter = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        _child_main(target, folder, engine, seconds, random.Random(f"{seed}:{target.name}").getrandbits(31), counter)
    status, usage = _wait_while_it_reads(child, counter)
    code = os.waitstatus_to_exitcode(status)
    if code:
        last = folder / FINDINGS / f"{target.name}.last"
        drawn = last.read_bytes() if last.is_file() else b""
        _keep_finding(folder, target, drawn, FuzzFinding("ended its process or hung", f"{code}", f"code{abs(code)}"))
    (folder / FINDINGS / f"{target.name}.last").unlink(missing_ok=True)
    tally.inputs += struct.unpack("<Q", counter[:])[0]
    tally.cpu_seconds += usage.ru_utime + usage.ru_stime
    tally.calls += 1


def _wait_while_it_reads(child: int, counter: mmap.mmap) -> tuple[int, resource.struct_rusage]:
    """Waits for the child's end, and kills it if one input hangs. counter: the number of inputs begun.

    A busy machine may leave a sound child without the CPU for minutes.
    """
    watched, number, since = psutil.Process(child), b"", time.monotonic()
    first = used = 0.0
    pid, status, usage = os.wait4(child, os.WNOHANG)
    while pid == 0:
        spent = sum(watched.cpu_times()[:2])
        if counter[:] != number:
            number, first = counter[:], spent
        if spent - used > IDLE_CPU:
            used, since = spent, time.monotonic()
        if spent - first > HANG_SECONDS or time.monotonic() - since > IDLE_SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
        pid, status, usage = os.wait4(child, os.WNOHANG)
    return status, usage


def _child_main(
    target: FuzzTarget, folder: Path, engine: Engine, seconds: float, seed: int, counter: mmap.mmap
) -> None:
    work = Path(tempfile.mkdtemp())
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(quiet, number)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        trial = TargetTrial(target, folder / GOOD, work)
        corpus, last = folder / CORPUS / target.name, folder / FINDINGS / f"{target.name}.last"
        for path in (corpus, last.parent):
            path.mkdir(parents=True, exist_ok=True)
        if not any(corpus.iterdir()):
            (corpus / "good").write_bytes(trial.first)

        def try_input(drawn: bytes) -> None:
            last.write_bytes(drawn)
            counter[:] = struct.pack("<Q", struct.unpack("<Q", counter[:])[0] + 1)
            finding = trial.read(drawn)
            if finding:
                _keep_finding(folder, target, drawn, finding)

        engine(trial, try_input, corpus, seconds, seed)
    except BaseException:
        (folder / ENGINE_ERROR).write_text(traceback.format_exc())
        os._exit(1)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os._exit(0)


def _keep_finding(folder: Path, target: FuzzTarget, drawn: bytes, finding: FuzzFinding) -> None:
    """Keeps the first input of each cause."""
    name = folder / FINDINGS / f"{target.name}-{finding.key}"
    if not Path(f"{name}.txt").exists():
        Path(f"{name}.bin").write_bytes(drawn)
        Path(f"{name}.txt").write_text(f"{target.name}: {finding.kind}\n{finding.detail}\n", errors="replace")


def fuzz_by_chance(
    trial: TargetTrial, try_input: Callable[[bytes], None], corpus: Path, seconds: float, seed: int
) -> None:
    """Tries mutated inputs, at least one."""
    draw = random.Random(seed)
    while True:
        try_input(mutate_bytes(draw, trial.first, 2 * len(trial.first) + 4096))
        if time.process_time() > seconds:
            return


def fuzz_by_coverage(
    trial: TargetTrial, try_input: Callable[[bytes], None], corpus: Path, seconds: float, seed: int
) -> None:
    """Lets libFuzzer draw the inputs, half of them by `mutate_bytes`. Ends the process."""
    import atheris

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        draw = random.Random(number)
        return mutate_bytes(draw, data, max_size) if draw.random() < 0.5 else atheris.Mutate(data, len(data))

    def try_in_time(drawn: bytes) -> None:
        if time.process_time() > seconds:
            os._exit(0)
        try_input(drawn)

    options = (
        f"-seed={seed or 1}", f"-timeout={NO_TIMEOUT}",
        f"-max_len={2 * len(trial.first) + 4096}", f"-rss_limit_mb={ADDRESS_SPACE >> 20}", "-verbosity=0",
        f"-artifact_prefix={trial.folder.parent}/",
    )  # fmt: skip
    atheris.Setup(["fuzz", *options, f"{corpus}"], try_in_time, custom_mutator=mutate)
    atheris.Fuzz()


def _instrument() -> None:
    """Lets every function of this package report the branches that it takes, but for those that draw the inputs."""
    import atheris

    package, own = f"{__name__.partition('.')[0]}.", __name__.rpartition(".")[0]
    for function in gc.get_objects():
        module = getattr(function, "__module__", None) if isinstance(function, types.FunctionType) else None
        if isinstance(module, str) and module.startswith(package) and not module.startswith(own):
            atheris.instrument_func(function)
