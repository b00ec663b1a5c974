"""A comparison with made-up results: each job returns a prescribed result and nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import LlamaConfig

from megatron_ligo.experiments.compare import comparison_config
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan
from megatron_ligo.experiments.compare.run_queue import ComparisonJob, JobQueue

FILE = """
small.path = "{folder}/small.json"
large = {{num_layers = 4, hidden_size = 32}}
fit = {{steps = 2, global_batch_size = 4, keep = "last"}}
pretrain = {{global_batch_size = 4}}
data = {{train = ["train"], valid = ["valid"], seq_length = 12}}
compare = {{seeds = [1, 2, 3], scratch_steps = 100, budgets = [0.25, 0.5, 1.0], lrs = [1e-3]}}
[arms.learned]
operator = {{method = "noisy_stack"}}
fit = {{lr = 1e-3}}
"""


def write_comparison(folder: Path, *sets: str) -> comparison_config.ComparisonConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"])
    config.to_json_file(folder / "small.json", use_diff=False)
    (folder / "compare.toml").write_text(FILE.format(folder=folder))
    return comparison_config.load_comparison(folder / "compare.toml", sets)


class MadeUpRuns:
    """Gives each job a result.

    end: a pretraining's last loss by job name; None if it diverged, KeyError if it is not done. fits: a fit's result by
    job name.
    """

    def __init__(self, folder: Path, end: Callable[[str], float | None], fits: Callable[[str], dict] | None = None):
        self.folder, self.end, self.fits, self.jobs = folder, end, fits, {}

    def plan(self, spec: comparison_config.ComparisonConfig) -> ComparisonPlan:
        plan = ComparisonPlan(spec, JobQueue(self.folder, "", print), self.get_result)
        self.step_flops = plan.step_flops
        return plan

    def get_result(self, job: ComparisonJob) -> dict | None:
        self.jobs[job.name] = job
        if job.kind == "grow":
            return {"losses": {}, "step": 0, "flops": 0}
        if job.kind == "codes":
            return {"losses": {}, "step": 0, "flops": 7.0 * self.step_flops}
        if job.kind == "fit":
            return self.fits(job.name) if self.fits else {"losses": {"end": 3.0}, "step": 2, "flops": 1.0}
        if job.keep:
            (self.folder / job.name / "run/checkpoints/step_1").mkdir(parents=True, exist_ok=True)
        try:
            loss = self.end(job.name)
        except KeyError:
            return None
        return {"losses": {} if loss is None else {"start": 4.0, "end": loss}, "step": 1, "flops": 1.0}
