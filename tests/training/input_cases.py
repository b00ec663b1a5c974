"""What changes under a run between a stop and its restart: each change, and a case that tries them on one rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from megatron_ligo.common.errors import LigoError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.export.metrics_rows import METRICS_FILE
from megatron_ligo.export.run_inputs import DEFAULT_POLICY, InputPolicy
from megatron_ligo.training.fit import Fit
from megatron_ligo.training.pretrain import Pretrain
from tests.training.test_pretrain import make_pair


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def scale_weights(path: Path) -> None:
    save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def set_eps(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))


def other_text(path: Path) -> None:
    make_pair(path.with_suffix(""), seed=5)


def edit_tokenizer(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def edit_a_loss(path: Path) -> None:
    first, *rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps({**json.loads(first), "loss": 1.0}) + "\n", *rows]))


def edit_seconds(path: Path) -> None:
    rows = [{**json.loads(line), "seconds": 0.5} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Change -> (file below the base folder, the name under which the error lists it).
CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "one bit of the training data": (flip_a_bit, "train.bin", "data.train 1.bin"),
    "training data of zeros": (zero, "train.bin", "data.train 1.bin"),
    "other training data": (other_text, "train.bin", "data.train 1.idx"),
    "one bit of the held-out data": (flip_a_bit, "valid.bin", "data.valid 1.bin"),
    "scaled small weights": (scale_weights, "small/model.safetensors", "weights"),
    "other small sizes": (set_eps, "small/config.json", "norm_eps"),
    "another tokenizer": (edit_tokenizer, "small/tokenizer.json", "tokenizer: tokenizer.json"),
}
JOBS = {"fit": Fit, "pretrain": Pretrain}


def run(tool: str, settings: dict, output: str, policy: InputPolicy = DEFAULT_POLICY, stop_after: int = 0):
    """Returns the losses of the steps, or the LigoError as text. stop_after: the only step whose checkpoint stays."""
    job = None
    try:
        job = JOBS[tool](RunConfig.from_dict(settings), Path(output), policy=policy)
        job.run()
    except LigoError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if job:
            job.engine.engine.destroy()
    if stop_after:
        for folder in (Path(output) / "checkpoints").iterdir():
            if folder.name != f"step_{stop_after}":
                shutil.rmtree(folder)
    return [json.loads(line)["loss"] for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def try_changes(tool: str, base: str, settings: dict, stop_after: int) -> dict:
    """Runs to the end, goes back to a checkpoint, and resumes from it after each change. Returns what each gave."""
    folder, output, copy = Path(base), Path(base) / tool, Path(base) / f"{tool}_resumed"
    results = {"whole": run(tool, settings, str(output), stop_after=stop_after)}

    def resume(policy: InputPolicy = DEFAULT_POLICY, edit: Callable[[Path], object] = lambda run: None):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(output, copy)
        edit(copy / METRICS_FILE)
        return run(tool, settings, str(copy), policy)

    results["untouched"] = resume()
    results["a digit of the metrics"] = resume(edit=edit_a_loss)
    results["no metrics"] = resume(edit=Path.unlink)
    results["accepted metrics"] = resume(InputPolicy(accept_changed=True), Path.unlink)
    results["tokens"] = [json.loads(line)["tokens"] for line in (copy / METRICS_FILE).read_text().splitlines()]
    results["seconds of the metrics"] = resume(edit=edit_seconds)
    for name, (change, file, _) in CHANGES.items():
        kept = {path: path.read_bytes() for path in folder.glob("*") if path.is_file()}
        kept |= {path: path.read_bytes() for path in (folder / "small").iterdir()}
        change(folder / file)
        results[name] = resume()
        if name == "scaled small weights":
            results["accepted"] = resume(InputPolicy(accept_changed=True))
            results["accepted rows"] = read_accepted_rows(copy)
            results["record"] = json.loads(next((copy / "checkpoints").glob("step_*/record.json")).read_text())["state"]
            shutil.rmtree(copy / "checkpoints" / f"step_{stop_after}", ignore_errors=True)
            results["accepted before"] = run(tool, settings, str(copy))
        for path, content in kept.items():
            path.write_bytes(content)
    for path in (output / "data_cache").glob("*/*shuffle_index.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    results["sample order of zeros"] = resume()
    moved = folder / "moved"
    moved.mkdir()
    for path in [*folder.glob("train.*"), *folder.glob("valid.*")]:
        path.rename(moved / path.name)
    settings = {**settings, "data": {**settings["data"], "train": [f"{moved}/train"], "valid": [f"{moved}/valid"]}}
    results["moved data"] = resume()
    results["full check"] = resume(InputPolicy(full_check=True))
    for path in [*moved.iterdir()]:
        path.rename(folder / path.name)
    return results


def read_accepted_rows(output: Path) -> dict[int, str]:
    """Returns the changes that metrics.jsonl says were accepted, by step."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["accepted_changes"] for row in rows if "accepted_changes" in row}


def edit_record(output: Path, edit: Callable[[dict], object]) -> None:
    for path in (output / "checkpoints").glob("step_*/record.json"):
        record = json.loads(path.read_text())
        edit(record)
        path.write_text(json.dumps(record))
