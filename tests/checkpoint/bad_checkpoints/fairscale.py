"""Meta's Llama files of two ranks that are damaged, mixed up or hostile."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoint.bad_checkpoints import Builder, edit_json, exactly, problem, register
from tests.checkpoint.bad_checkpoints.universal import Evil

FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"
GATE = "layers.1.feed_forward.w1.weight"
fairscale: dict[str, Builder] = {}


def edit(folder: Path, file: str = SECOND, **changes) -> None:
    """Replaces or adds tensors; None removes one."""
    state = torch.load(folder / file) | changes
    torch.save({name: value for name, value in state.items() if value is not None}, folder / file)


@register(fairscale)
def a_tensor_is_missing_on_one_rank(folder):
    edit(folder, **{GATE: None})
    return problem(f"{GATE} ({SECOND})", found="nothing")


@register(fairscale)
def a_tensor_too_many(folder):
    edit(folder, FIRST, **{"layers.9.attention.wq.weight": torch.ones(3)})
    return problem(f"layers.9.attention.wq.weight ({FIRST})", "no such tensor")


@register(fairscale)
def a_tensor_of_another_shape(folder):
    edit(folder, **{GATE: torch.ones(25, 48)})
    return problem(GATE, "(26, 48)", "(25, 48)")


@register(fairscale)
def a_tensor_of_another_dtype(folder):
    edit(folder, **{GATE: torch.ones(26, 48, dtype=torch.float16)})
    return problem(GATE, found="torch.float16")


@register(fairscale)
def a_tensor_of_integers(folder):
    edit(folder, **{GATE: torch.ones(26, 48, dtype=torch.int8)})
    return problem(GATE, found="torch.int8")


@register(fairscale)
def a_sparse_tensor(folder):
    edit(folder, **{GATE: torch.eye(26, 48).to_sparse()})
    return problem(GATE, found="sparse")


@register(fairscale)
def two_tensors_on_the_same_numbers(folder):
    shared = torch.ones(26, 48)
    edit(folder, **{GATE: shared, GATE.replace("w1", "w3"): shared})
    return problem("layers.1.feed_forward.w3.weight", "numbers of its own", GATE)


@register(fairscale)
def a_bit_of_a_tensor(folder):
    content = bytearray((folder / SECOND).read_bytes())
    content[content.index(torch.load(folder / SECOND)[GATE].numpy().tobytes()) + 1] ^= 1
    (folder / SECOND).write_bytes(content)
    return problem(GATE, "a whole file", "checksum")


@register(fairscale)
def a_number_for_a_tensor(folder):
    edit(folder, **{GATE: 3})
    return problem(GATE, found="int")


@register(fairscale)
def a_norm_that_differs_between_ranks(folder):
    edit(folder, **{"layers.1.ffn_norm.weight": torch.ones(48)})
    return problem("layers.1.ffn_norm.weight", found="rank 1")


@register(fairscale)
def an_embedding_cut_in_two_ways(folder):
    edit(folder, **{"tok_embeddings.weight": torch.ones(38, 24)})
    return problem("tok_embeddings.weight", found="(38, 24)")


@register(fairscale)
def an_output_that_is_not_the_embedding(folder):
    edit(folder, **{"output.weight": torch.ones(19, 48)})
    return problem("output.weight, rank 1", "tok_embeddings.weight")


@register(fairscale)
def a_rank_is_missing(folder):
    (folder / SECOND).rename(folder / "consolidated.02.pth")
    return problem(expected=FIRST, found="consolidated.02.pth")


@register(fairscale)
def a_rank_too_many(folder):
    (folder / "consolidated.02.pth").write_bytes((folder / SECOND).read_bytes())
    return problem("tp = 3", "num_kv_heads")


@register(fairscale)
def a_file_cut_off(folder):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-300])
    return problem(SECOND)


@register(fairscale)
def a_file_that_runs_code(folder):
    torch.save({"norm.weight": Evil()}, folder / SECOND)
    return problem(SECOND, "tensors and plain values", "exec")


@register(fairscale)
def no_dict(folder):
    torch.save([torch.ones(3)], folder / SECOND)
    return problem(SECOND, found="list")


@register(fairscale)
def a_million_layers(folder):
    (folder / "dims.json").unlink()
    edit_json(folder / "params.json", n_layers=1_000_000)
    return problem("n_layers", found="1000000")


@register(fairscale)
def params_of_another_network(folder):
    edit_json(folder / "params.json", moe={"num_experts": 8})
    return ("moe",)


@register(fairscale)
def params_of_no_numbers(folder):
    edit_json(folder / "params.json", dim="48", norm_eps=-1.0, use_scaled_rope=1, vocab_size=2.5)
    return exactly(
        problem("dim", found="'48'"),
        problem("norm_eps", found="-1.0"),
        problem("use_scaled_rope"),
        problem("vocab_size"),
    )


@register(fairscale)
def params_that_contradict_the_sizes(folder):
    edit_json(folder / "params.json", norm_eps=1e-6, n_kv_heads=3)
    return problem("params.json: norm_eps", found="1e-06") + problem("params.json: n_kv_heads", found="3")


@register(fairscale)
def params_of_another_vocabulary(folder):
    edit_json(folder / "params.json", vocab_size=64)
    return problem("vocab_size", "-1 or 38", "64")


@register(fairscale)
def unknown_context_length(folder):
    (folder / "dims.json").unlink()
    return problem("params.json", found="max_seq_len")


@register(fairscale)
def heads_that_do_not_divide(folder):
    edit_json(folder / "params.json", n_heads=5)
    return problem("dim", "n_heads = 5", "48")


@register(fairscale)
def an_ffn_size_beyond_any_number(folder):
    edit_json(folder / "params.json", ffn_dim_multiplier=1e308)
    return problem("ffn_dim_multiplier", "a positive number below 1000", "1e+308")
