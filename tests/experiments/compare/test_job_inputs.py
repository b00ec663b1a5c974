"""A job of a comparison is bound to the content of its data and of the small model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_ligo.common.errors import DataError, LigoError
from megatron_ligo.config.run_config import DataSection, RunConfig, SmallSection
from megatron_ligo.experiments.compare import run_folder
from megatron_ligo.experiments.compare.run_queue import ComparisonJob, JobQueue
from tests.experiments.compare.made_up_runs import MadeUpRuns, write_comparison
from tests.tiny_models import hf_llama, llama_config
from tests.training import input_cases
from tests.training.test_pretrain import make_pair


@pytest.mark.parametrize("change", ["one bit of the training data", "other training data", "scaled small weights"])
def test_a_finished_job_on_changed_inputs_is_refused(tmp_path, change):
    make_pair(tmp_path / "train", 0)
    hf_llama(llama_config()).save_pretrained(tmp_path / "small")
    data = DataSection(train=(str(tmp_path / "train"),))
    config = replace(RunConfig(), data=data, small=SmallSection(path=str(tmp_path / "small")))
    job, jobs = ComparisonJob("a", "pretrain", config), JobQueue(tmp_path / "jobs", "true", print)
    # The launcher runs nothing.
    with pytest.raises(LigoError, match="a run that succeeds"):
        jobs.run(job)
    (jobs.folder_of(job) / run_folder.RESULT).write_text('{"losses": {}}')
    assert JobQueue(tmp_path / "jobs", "", print).result(job) == {"losses": {}}
    edit, file, name = input_cases.CHANGES[change]
    edit(tmp_path / file)
    with pytest.raises(DataError) as error:
        JobQueue(tmp_path / "jobs", "", print).result(job)
    assert name in str(error.value) and str(tmp_path) in str(error.value)
    accepting = JobQueue(tmp_path / "jobs", "", print, accept_changed=True)
    assert accepting.result(job) == accepting.result(job) == {"losses": {}}
    (accepted,) = json.loads((jobs.folder_of(job) / run_folder.JOB).read_text())["accepted_changes"]
    assert any(name in change for change in accepted["changes"])
    assert JobQueue(tmp_path / "jobs", "", print).result(job) == {"losses": {}}
    record = json.loads((jobs.folder_of(job) / run_folder.JOB).read_text())
    del record["inputs"]
    (jobs.folder_of(job) / run_folder.JOB).write_text(json.dumps(record))
    assert JobQueue(tmp_path / "jobs", "", print).result(job) == {"losses": {}}


def test_the_small_format_is_that_of_the_path_that_the_user_names(tmp_path):
    spec = write_comparison(tmp_path, "small.format=hf", "compare.source_steps=10")
    runs = MadeUpRuns(tmp_path, lambda name: 2.0)
    plan = runs.plan(spec)
    plan.train(next(arm for arm in spec.arms if arm.fitted), 1, 1.0, 1e-3)
    formats = {name: job.config.small.format for name, job in runs.jobs.items()}
    assert formats["source"] == "hf" and formats["learned/seed_1/fit"] == "auto"
