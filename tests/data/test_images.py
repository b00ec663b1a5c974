"""A vision transformer on small images end to end: prepared, pretrained, fitted, grown, trained further, resumed."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import DataError
from megatron_ligo.config.run_config import SCRATCH, DataSection, RunConfig
from megatron_ligo.data.image_dataset import open_image_dataset
from megatron_ligo.data.prepare_images import DIGITS_FILE, prepare_images, read_digits, read_npz
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.export import handoff, provenance
from megatron_ligo.models.loss import compute_accuracy
from megatron_ligo.report.run_records import read_runs
from tests import image_models, layer_norm_models
from tests.training.pretrain_runs import fit, pretrain

# Ten tokens, divisible by two ranks; five labels, not divisible by two ranks.
SMALL = image_models.image_config(image_size=9, num_channels=1, num_heads=4, num_kv_heads=4, head_dim=6, norm_eps=1e-5)
COUNT = 200


def make_images() -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright bar, whose position is the label."""
    random = np.random.default_rng(0)
    labels = random.integers(0, SMALL.vocab_size, COUNT)
    pixels = random.integers(0, 60, (COUNT, 1, 9, 9)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 2 * label : 2 * label + 1 if label == 4 else 2 * label + 2] += 180
    return pixels, labels


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> tuple[dict, Path]:
    """The config of a pretraining from random weights, and the folder with its data and runs."""
    base = tmp_path_factory.mktemp("images")
    np.savez(base / "images.npz", images=make_images()[0], labels=make_images()[1])
    counts = prepare_images(*read_npz(base / "images.npz"), base / "data", 0.2)
    assert sum(counts.values()) == COUNT and 20 < counts["valid"] < 60
    (base / "config.json").write_text(json.dumps(config_json.to_hf_config(SMALL, {}, torch.float32)))
    table = RunConfig().to_dict()
    table["small"]["path"] = str(base / "config.json")
    table["data"] |= {split: [str(base / f"data/{split}.safetensors")] for split in ("train", "valid")}
    table["pretrain"] |= {
        "start": SCRATCH,
        "steps": 6,
        "lr": 1e-2,
        "warmup_steps": 0,
        "schedule": "constant",
        "save_every": 2,
    }
    table["pretrain"] |= {"global_batch_size": 16, "micro_batch_size": 8, "eval_every": 3, "eval_samples": 16}
    return table, base


def test_a_vit_is_pretrained_fitted_grown_and_pretrained_further(pools, settings):
    table, base = settings
    one = pools(1).run(pretrain, settings=table, output=str(base / "one"))
    assert one["losses"]["end"] < one["losses"]["start"] - 0.1
    trained = formats.open(base / "one" / "checkpoints/step_6/state")
    assert evaluate_with_transformers(trained, table) == pytest.approx(
        (one["losses"]["end"], one["accuracy"]["end"]), rel=1e-5
    )
    assert one["steps"][2]["eval_accuracy"] is not None and one["accuracy"]["start"] < 0.7
    # The same at another layout, killed and resumed.
    table["pretrain"]["parallel"] |= {"pp": 2}
    assert pools(2).run(pretrain, settings=table, output=str(base / "cut"), die_after=3) == {"killed": 3}
    cut = pools(2).run(pretrain, settings=table, output=str(base / "cut"))
    assert [row["loss"] for row in cut["steps"]] == pytest.approx([row["loss"] for row in one["steps"]], rel=1e-4)
    assert cut["accuracy"] == one["accuracy"]
    # Fit, growth and hand-off.
    table["small"]["path"] = str(base / "one" / "checkpoints/step_6/state")
    table["large"] |= {"num_layers": 4, "hidden_size": 48, "num_heads": 8, "ffn_size": 60}
    table["operator"]["noise"] = 0.5
    table["fit"] |= {"steps": 3, "lr": 1e-3, "save_every": 0, "global_batch_size": 8, "micro_batch_size": 4}
    table["fit"]["parallel"] |= {"tp": 2, "sequence_parallel": True}
    table["pretrain"] |= {"start": str(base / "grown"), "steps": 2, "lr": 2e-3}
    pools(2).run(fit, settings=table, output=str(base / "fit"))
    handoff.grow_from_config(RunConfig.from_dict(table), base / "fit" / "operator", base / "grown")
    table["pretrain"]["parallel"] |= {"tp": 2, "pp": 1, "sequence_parallel": True}
    grown = pools(2).run(pretrain, settings=table, output=str(base / "large"))
    fitted = provenance.read(base / "grown")["fit"]["losses"]
    assert fitted["start"] == pytest.approx(one["losses"]["end"], abs=0.5)
    assert grown["losses"]["start_on_fit_batch"] == pytest.approx(fitted["end"], rel=1e-5)
    assert grown["losses"]["end"] < grown["losses"]["start"]
    runs = read_runs([base / "large", base / "fit"])
    assert [run.evaluation_set.seq_length for run in runs] == [SMALL.tokens_per_image] * 2


def evaluate_with_transformers(source, table) -> tuple[float, float]:
    """Loss and accuracy of the transformers model on the held-out images."""
    tensors = load_file(table["data"]["valid"][0])
    pixels, labels = tensors["images"][:16].float() / 127.5 - 1, tensors["labels"][:16]
    with torch.no_grad():
        logits = layer_norm_models.built(source)(pixels).logits
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(dim=1) == labels).float().mean())


def test_sample_order(settings):
    table, _ = settings
    meshes.init_distributed()
    section = DataSection(train=tuple(table["data"]["train"]), valid=tuple(table["data"]["valid"]), seed=3)
    data = open_image_dataset(section, SMALL, 8)
    count = len(load_file(section.train[0])["labels"])
    epochs = [data.train_batch(epoch, count, count, 1, 0)[0] for epoch in (0, 1, 0)]
    assert torch.equal(epochs[0]["tokens"], epochs[2]["tokens"])
    assert not torch.equal(epochs[0]["tokens"], epochs[1]["tokens"])
    images = [sorted(map(tuple, epoch["tokens"].flatten(1).tolist())) for epoch in epochs[:2]]
    assert images[0] == images[1] and len(set(images[0])) == count
    ranks = [data.train_batch(0, 8, 2, 2, rank) for rank in (0, 1)]
    whole = data.train_batch(0, 8, 8, 1, 0)[0]["labels"]
    assert torch.equal(whole, torch.cat([part["labels"] for pair in zip(*ranks, strict=True) for part in pair]))


def test_existing_files_must_hold_the_same_images(settings):
    _, base = settings
    prepare_images(*make_images(), base / "data", 0.2)
    with pytest.raises(DataError) as error:
        prepare_images(255 - make_images()[0], make_images()[1], base / "data", 0.2)
    assert error.value.problems[0].where == str(base / "data" / "valid.safetensors")


def test_files_that_do_not_fit_the_model_are_refused(tmp_path):
    bad = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.tensor([0, 1, 9])}
    save_file(bad, tmp_path / "bad.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    bad_path, torn, missing = (str(tmp_path / f"{name}.safetensors") for name in ("bad", "torn", "missing"))
    section = DataSection(train=(0.5, bad_path, torn, missing), pixel_mean=(0.1, 0.2))
    with pytest.raises(DataError) as error:
        open_image_dataset(section, SMALL, 8)
    problems = {problem.where: problem for problem in error.value.problems}
    assert list(problems) == [
        "data.train", f"{bad_path}: images", f"{bad_path}: labels", torn, missing, "data.valid", "data.pixel_mean",
    ]  # fmt: skip
    assert problems["data.train"].found == "0.5"
    assert "n x 1 x 9 x 9" in problems[f"{bad_path}: images"].expected
    assert "0 to 4" in problems[f"{bad_path}: labels"].expected
    assert problems[f"{bad_path}: labels"].found == "0 to 9"


def test_an_npz_of_floats_is_refused(tmp_path):
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 9, 9)), labels=np.zeros(2))
    with pytest.raises(DataError) as error:
        read_npz(tmp_path / "floats.npz")
    assert error.value.problems[0].where == f"{tmp_path / 'floats.npz'}: images"
    assert "uint8" in error.value.problems[0].expected and "float64" in error.value.problems[0].found


@pytest.mark.parametrize("kind", ["a folder", "nothing there", "another kind of file"])
def test_what_is_no_npz_is_named(tmp_path, kind):
    path = tmp_path / "images.npz"
    if kind == "a folder":
        path.mkdir()
    elif kind == "another kind of file":
        np.save(tmp_path / "images.npy", np.zeros(2))
        (tmp_path / "images.npy").rename(path)
    with pytest.raises(DataError, match=rf"expected an \.npz with images and labels, found {kind}\.$"):
        read_npz(path)


def test_digits_of_scikit_learn(tmp_path):
    with pytest.raises(DataError) as error:
        read_digits(tmp_path)
    assert error.value.problems[0].where == str(tmp_path / DIGITS_FILE)
    assert "pip install" in error.value.problems[0].hint
    (tmp_path / DIGITS_FILE).parent.mkdir(parents=True)
    with gzip.open(tmp_path / DIGITS_FILE, "wt") as file:
        file.writelines(",".join(map(str, [*[16, 0, 8, 3] * 16, label])) + "\n" for label in (4, 9))
    pixels, labels = read_digits(tmp_path)
    assert pixels.shape == (2, 1, 8, 8) and labels.tolist() == [4, 9]
    assert pixels[0, 0, 0, :4].tolist() == [255, 0, 128, 48]


def test_accuracy_counts_unmasked_samples():
    meshes.init_distributed()
    logits = torch.tensor(
        [[[1.0, 3.0, 9.0], [4.0, 4.0, 0.0], [0.0, 1.0, 0.0]]]
    )  # (1, 3, 3); the last column is padding
    labels, mask = torch.tensor([[1], [0], [0]]), torch.ones(3, 1)
    assert compute_accuracy(logits, labels, mask, 2, meshes.build_mesh(1, 1)) == pytest.approx(2 / 3)
    assert compute_accuracy(
        logits, labels, torch.tensor([[1.0], [0], [1]]), 2, meshes.build_mesh(1, 1)
    ) == pytest.approx(1 / 2)
