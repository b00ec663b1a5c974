"""Pretraining runs from their config: starts, the loss after a hand-off, resumption, refusals, the command."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf.format import HfReader
from megatron_ligo.config.run_config import SCRATCH, DataSection, PretrainSection, RunConfig
from megatron_ligo.data.text_dataset import open_text_dataset
from megatron_ligo.export import provenance
from megatron_ligo.training.lr_schedule import learning_rate
from megatron_ligo.training.run_extension import describe_extension
from tests.tiny_models import hf_llama, llama_config
from tests.training.pretrain_runs import fit, pretrain

ROOT = Path(__file__).resolve().parents[2]
DIMS = llama_config(tied=True, num_heads=8, num_kv_heads=4, num_layers=4)
SEQ, STEPS, BATCH = 12, 6, 8
FIT_LOSS = 3.5


def make_pair(prefix: Path, seed: int) -> str:
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(60):
        ids = random.integers(0, DIMS.vocab_size, random.integers(5, 40))
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Data, a small checkpoint, and a hand-off whose record states FIT_LOSS as the fit's last loss."""
    folder = tmp_path_factory.mktemp("pretrain")
    for seed, name in enumerate(("train", "valid")):
        make_pair(folder / name, seed)
    hf_llama(DIMS).save_pretrained(folder / "hf")
    source = HfReader(folder / "hf")
    convert(source, folder / "handoff/universal", "universal")
    digest = data(folder).eval_digest(BATCH)
    fit = {"eval": {"samples": BATCH, "digest": digest}, "losses": {"start": 4.0, "end": FIT_LOSS}}
    provenance.write(folder / "handoff", {"formats": ["universal"], "fit": fit})
    return folder


def data(folder: Path):
    section = DataSection(train=(str(folder / "train"),), valid=(str(folder / "valid"),), seq_length=SEQ)
    return open_text_dataset(section, SEQ, STEPS * BATCH, BATCH, section.seed, folder / "cache")


def settings(base: Path, start: str = "handoff", **changes) -> dict:
    """changes: keys of [pretrain], or of its layout."""
    table = RunConfig().to_dict()
    table["data"] |= {"train": [str(base / "train")], "valid": [str(base / "valid")], "seq_length": SEQ}
    run = table["pretrain"]
    run |= {
        "start": start if start in ("", SCRATCH) else str(base / start),
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 2,
    }
    run |= {"schedule": "cosine", "save_every": 2, "eval_samples": BATCH}
    for key, value in changes.items():
        (run["parallel"] if key in run["parallel"] else run)[key] = value
    return table


def reference(base: Path, grown: bool = True) -> tuple[float, list[float]]:
    """Trains the transformers model in plain PyTorch; returns the first held-out loss and the loss of each step."""
    from megatron_ligo.training.engine import build_parameter_groups
    from megatron_ligo.training.lr_schedule import learning_rate, schedule_after_growth

    run = RunConfig.from_dict(settings(base)).pretrain
    run = schedule_after_growth(run) if grown else run
    model = hf_llama(DIMS)
    groups = build_parameter_groups(model, run.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=tuple(run.betas), eps=run.eps)

    def loss_of(batch):
        return F.cross_entropy(model(batch["tokens"]).logits.flatten(0, 1), batch["labels"].flatten())

    opened = data(base)
    with torch.no_grad():
        evaluated = float(loss_of(opened.eval_parts(BATCH, BATCH, 1, 0)[0][1][0]))
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step)
        loss = loss_of(opened.train_batch(step, BATCH, BATCH, 1, 0)[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return evaluated, losses


def losses_of(record: dict) -> list[float]:
    return [row["loss"] for row in record["steps"]]


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (4, {"tp": 2, "pp": 2}), (4, {"tp": 2, "zero": 3}), (2, {"micro_batch_size": 2}), (2, {"pp": 2})],
    ids=str,
)
def test_training_from_a_hand_off_equals_plain_pytorch(pools, base, tmp_path, world, layout):
    evaluated, losses = reference(base)
    record = pools(world).run(pretrain, settings=settings(base, **layout), output=str(tmp_path))
    assert record["losses"]["start"] == pytest.approx(evaluated, rel=1e-6)
    assert record["losses"]["start_on_fit_batch"] == record["losses"]["start"]
    assert record["losses"]["fit"] == FIT_LOSS
    assert losses_of(record) == pytest.approx(losses, rel=1e-5)
    assert record["losses"]["end"] == record["steps"][-1]["eval_loss"]
    assert record["eval"]["digest"] == data(base).eval_digest(BATCH)
    assert json.loads((tmp_path / "pretrain.json").read_text())["losses"] == record["losses"]


KILLED = [(1, {}), (2, {"pp": 2}), (4, {"tp": 2, "pp": 2}), (4, {"tp": 2, "zero": 3})]


@pytest.mark.parametrize(
    "precision, world, layout",
    [
        *(("fp32", *each) for each in [*KILLED, (2, {"zero": 2})]),
        *(pytest.param("bf16", *each, marks=[pytest.mark.long] * ("pp" in each[1])) for each in KILLED),
    ],
    ids=str,
)
def test_a_killed_run_resumes_exactly(pools, base, tmp_path, precision, world, layout):
    table = settings(base, precision=precision, **layout)
    whole = pools(world).run(pretrain, settings=table, output=str(tmp_path / "whole"))
    killed = pools(world).run(pretrain, settings=table, output=str(tmp_path / "killed"), die_after=5)
    assert killed == {"killed": 5}
    resumed = pools(world).run(pretrain, settings=table, output=str(tmp_path / "killed"))
    assert resumed["taken"] == STEPS - 4
    assert losses_of(resumed) == losses_of(whole)
    assert resumed["losses"] == whole["losses"]
    again = pools(world).run(pretrain, settings=table, output=str(tmp_path / "killed"))
    assert again["taken"] == 0
    assert again["losses"] == whole["losses"]


def test_from_scratch_and_from_another_format(pools, base, tmp_path):
    table = settings(base, start=SCRATCH)
    table["small"]["path"] = str(base / "hf" / "config.json")
    table["large"]["num_layers"] = 5
    runs = [
        pools(world).run(pretrain, settings=changed(table, layout), output=str(tmp_path / str(world)))
        for world, layout in ((1, {}), (2, {"tp": 2}), (4, {"tp": 2, "pp": 2}))
    ]
    assert runs[0]["dims"]["num_layers"] == 5
    assert runs[0]["losses"]["start"] == pytest.approx(np.log(DIMS.vocab_size), rel=0.02)
    for run in runs[1:]:
        assert losses_of(run) == pytest.approx(losses_of(runs[0]), rel=1e-5)
    from_hf = pools(2).run(pretrain, settings=settings(base, "hf", pp=2), output=str(tmp_path / "hf"))
    assert losses_of(from_hf) == pytest.approx(reference(base, grown=False)[1], rel=1e-5)


@pytest.mark.parametrize("zero", [1, 3])
def test_bf16_masters_hold_the_fp32_checkpoint(pools, base, tmp_path, zero):
    by_deepspeed, filled = [
        pools(2).run(
            pretrain,
            settings=settings(base, start, precision="bf16", zero=zero, grown_peak=1.0),
            output=str(tmp_path / start),
        )
        for start in ("handoff", "hf")
    ]
    assert losses_of(filled) == losses_of(by_deepspeed)


def test_masters_and_moments_in_bf16_take_a_step(pools, base, tmp_path):
    """The profile for models that are too large for fp32 optimizer states trains."""
    profile = str(ROOT / "launch_scripts" / "grow_1b.json")
    run = settings(base, steps=2, pp=4, precision="bf16", ds_config=profile, save_every=0)
    bf16 = pools(4).run(pretrain, settings=run, output=str(tmp_path / "low"))
    plain = pools(4).run(pretrain, settings=settings(base, steps=2, pp=4, save_every=0), output=str(tmp_path / "fp32"))
    assert losses_of(bf16) == pytest.approx(losses_of(plain), rel=2e-2)
    assert losses_of(bf16) != losses_of(plain)


def test_a_run_without_steps_only_evaluates(pools, base, tmp_path):
    record = pools(2).run(pretrain, settings=settings(base, "hf", steps=0, tp=2), output=str(tmp_path))
    assert record["losses"] == {"start": pytest.approx(reference(base)[0], rel=1e-6)}
    assert 0 < record["deviation"] < 1
    assert not (tmp_path / "checkpoints").exists()


def test_bad_settings_are_refused_before_anything_is_built(pools, base, tmp_path):
    unfinished = tmp_path / "unfinished"
    (unfinished / "universal").mkdir(parents=True)
    for change, expected in [
        (settings(base, tp=3), "multiple of tp x pp"),
        (settings(base, "nowhere"), "nowhere: expected a checkpoint"),
        (settings(base, start=""), "pretrain.start: expected a start: a hand-off, a checkpoint, or 'scratch'"),
        (settings(base, start=SCRATCH), "small.path: expected a model, or a config.json, found none"),
        (settings(base, start=str(unfinished)), "expected a complete hand-off"),
        (settings(base, global_batch_size=9), "--set pretrain.global_batch_size=10"),
        (changed(settings(base), {}, data={"seq_length": 65}), "at most the model's 64 positions"),
        (changed(settings(base, steps=0), {}, data={"valid": []}), "data.valid: expected held-out data"),
    ]:
        error = pools(2).run(pretrain, settings=change, output=str(tmp_path / "out"))
        assert isinstance(error, str), expected
        assert expected in error
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_run_resumes_only_with_its_own_settings(pools, base, tmp_path):
    pools(1).run(pretrain, settings=settings(base, steps=2), output=str(tmp_path))
    error = pools(1).run(pretrain, settings=settings(base, steps=2, lr=0.5), output=str(tmp_path))
    assert "pretrain.lr: expected 0.01, found 0.5" in error
    (tmp_path / "pretrain.json").write_text("{")
    error = pools(1).run(pretrain, settings=settings(base, steps=2), output=str(tmp_path))
    assert "expected the record of the run that is resumed" in error


def test_a_finished_run_is_extended(pools, base, tmp_path):
    """With a constant learning rate to the same losses as a run that was as long from the start; linked checkpoints
    of the run stay where they are, and are no obstacle."""
    short, long = (settings(base, steps=steps, schedule="constant", keep_last=1) for steps in (2, 6))
    whole = pools(1).run(pretrain, settings=long, output=str(tmp_path / "whole"))
    pools(1).run(pretrain, settings=short, output=str(tmp_path / "run"))
    checkpoint = tmp_path / "run/checkpoints/step_2"
    checkpoint.rename(tmp_path / "moved")
    checkpoint.symlink_to(tmp_path / "moved")
    extended = pools(1).run(pretrain, settings=long, output=str(tmp_path / "run"))
    assert losses_of(extended) == losses_of(whole)
    assert extended["losses"] == whole["losses"]
    assert extended["extensions"] == [{"from": 2, "to": 6, "step": 2}]
    assert json.loads((tmp_path / "run/pretrain.json").read_text())["run"]["pretrain"]["steps"] == 6
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step_2", "step_6"]
    assert checkpoint.is_symlink() and (tmp_path / "moved/record.json").is_file()
    error = pools(1).run(pretrain, settings=short, output=str(tmp_path / "run"))
    assert "pretrain.steps: expected 6, found 2" in error
    error = pools(1).run(pretrain, settings={**long, "data": {**long["data"], "seed": 9}}, output=str(tmp_path / "run"))
    assert "data.seed" in error
    table = {**settings(base), "small": {**long["small"], "path": str(base / "hf")}}
    with pytest.raises(RuntimeError, match="expected a new folder, or one of a fit, found a pretraining"):
        pools(1).run(fit, settings=table, output=str(tmp_path / "run"))


def test_runs_of_all_lengths_share_a_trunk(pools, base, tmp_path):
    """Copies of a trunk, each with its own decay, end bit for bit as runs that were so long from the start."""
    trunk = settings(base, steps=3, schedule="wsd")
    trained = pools(1).run(pretrain, settings=trunk, output=str(tmp_path / "trunk"))
    assert not isinstance(trained, str), trained
    for steps, decay in ((5, 2), (6, 3)):
        branch = settings(base, steps=steps, schedule="wsd", decay_steps=decay)
        shutil.copytree(tmp_path / "trunk", tmp_path / f"branch_{steps}")
        continued = pools(1).run(pretrain, settings=branch, output=str(tmp_path / f"branch_{steps}"))
        whole = pools(1).run(pretrain, settings=branch, output=str(tmp_path / f"whole_{steps}"))
        assert losses_of(continued) == losses_of(whole) and continued["losses"] == whole["losses"]


def test_the_rate_of_a_trunk_and_of_its_decay():
    section = PretrainSection(steps=10, lr=1.0, min_lr=0.1, warmup_steps=2, schedule="wsd", decay_steps=4)
    rates = [learning_rate(section, step) for step in range(10)]
    assert rates[:7] == [0.5, *[1.0] * 5, pytest.approx(0.775)]
    assert rates[9] == pytest.approx(0.1)
    trunk = replace(section, decay_steps=0)
    assert [learning_rate(trunk, step) for step in range(10)][2:] == [1.0] * 8
    text = describe_extension({"from": 5, "to": 10}, section, 5)
    assert "the next learning rate is 1, and it decays over the last 4 steps" in text


def test_an_extended_schedule_is_that_of_the_longer_run():
    section = PretrainSection(steps=200, lr=1e-3, warmup_steps=0, schedule="linear")
    text = describe_extension({"from": 100, "to": 200}, section, 100)
    assert "the linear schedule is that of 200 steps: the next learning rate is 0.000497, not 0" in text
    constant = describe_extension({"from": 100, "to": 200}, replace(section, schedule="constant"), 100)
    assert "the learning rate stays 0.001" in constant


def test_output_without_a_reader_ends_no_training(base, tmp_path):
    """This happens with `| head -3`, and with a `tee` that dies."""
    config = tmp_path / "run.toml"
    config.write_text(
        f'[data]\ntrain = ["{base}/train"]\nvalid = ["{base}/valid"]\nseq_length = {SEQ}\n'
        f'[pretrain]\nstart = "{base}/hf"\nsteps = 8\nsave_every = 4\n'
    )
    command = [sys.executable, "tools/pretrain.py", "--config", config, "--output", tmp_path / "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=-1, stderr=subprocess.STDOUT) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 1/"):
                break
        summary = "".join(lines)
        for part in (f"{base}/hf (a checkpoint)", "parameters", "TP 1 x PP 1 x DP 1, ZeRO 1", "768 to do", "FLOPs"):
            assert part in summary, summary
        process.stdout.close()
        assert process.wait(240) == 0
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "out/checkpoints/step_8/record.json").is_file()


def changed(table: dict, layout: dict, **sections) -> dict:
    table = deepcopy(table)
    table["pretrain"]["parallel"] |= layout
    for name, values in sections.items():
        table[name] |= values
    return table


def test_the_command_under_the_launcher(base, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        f'[data]\ntrain = ["{base}/train"]\nvalid = ["{base}/valid"]\nseq_length = {SEQ}\n'
        f'[pretrain]\nstart = "{base}/handoff"\nsteps = 2\n[pretrain.parallel]\ntp = 2\n'
    )
    arguments = ["tools/pretrain.py", "--config", str(config), "--output", str(tmp_path / "out")]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29871"]
    # The launcher and the ranks must use this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *arguments], cwd=ROOT, env=env, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at the end of the fit: 3.500000" in done.stderr + done.stdout
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2
    refused = subprocess.run(
        [sys.executable, *arguments, "--set", "pretrain.lr=0.5", "--set", "pretrain.parallel.tp=1"],
        cwd=ROOT, env=env, timeout=240, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "holds a run with other settings" in refused.stderr
    assert "Traceback" not in refused.stderr
