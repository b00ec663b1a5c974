"""A vision transformer's whole way on small pictures: prepared, pretrained, fitted, grown, trained on, resumed."""

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
from megatron_ligo.config.run_config import DataSection, RunConfig
from megatron_ligo.data.image_dataset import open_image_dataset
from megatron_ligo.data.prepare_images import DIGITS_FILE, prepare_images, read_digits, read_npz
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.export import handoff, provenance
from megatron_ligo.models.loss import accuracy
from megatron_ligo.report.run_records import read_runs
from tests import image_models, layer_norm_models
from tests.training.pretrain_runs import fit, pretrain

# Ten tokens, so that two ranks can share them; labels that two ranks cannot share evenly.
SMALL = image_models.dims_of(image_size=9, num_channels=1, num_heads=4, num_kv_heads=4, head_dim=6, norm_eps=1e-5)
COUNT = 200


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright bar, whose place is the label."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, SMALL.vocab_size, COUNT)
    pixels = draw.integers(0, 60, (COUNT, 1, 9, 9)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 2 * label : 2 * label + 1 if label == 4 else 2 * label + 2] += 180
    return pixels, labels


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> tuple[dict, Path]:
    """A run's settings for fresh weights, and the folder in which everything is."""
    base = tmp_path_factory.mktemp("images")
    np.savez(base / "drawn.npz", images=drawn()[0], labels=drawn()[1])
    counts = prepare_images(*read_npz(base / "drawn.npz"), base / "data", 0.2)
    assert sum(counts.values()) == COUNT and 20 < counts["valid"] < 60
    (base / "config.json").write_text(json.dumps(config_json.to_hf_config(SMALL, {}, torch.float32)))
    table = RunConfig().to_dict()
    table["small"]["path"] = str(base / "config.json")
    table["data"] |= {split: [str(base / f"data/{split}.safetensors")] for split in ("train", "valid")}
    table["pretrain"] |= {"steps": 6, "lr": 1e-2, "warmup_steps": 0, "schedule": "constant", "save_every": 2}
    table["pretrain"] |= {"global_batch_size": 16, "micro_batch_size": 8, "eval_every": 3, "eval_samples": 16}
    return table, base


def test_the_journey_of_a_vit(pools, settings):
    table, base = settings
    one = pools(1).run(pretrain, settings=table, output=str(base / "one"))
    assert one["losses"]["end"] < one["losses"]["start"] - 0.1
    trained = formats.open(base / "one" / "checkpoints/step_6/state")
    assert held_out(trained, table) == pytest.approx((one["losses"]["end"], one["accuracy"]["end"]), rel=1e-5)
    assert one["steps"][2]["eval_accuracy"] is not None and one["accuracy"]["start"] < 0.7
    # The same at another layout, killed on the way and resumed.
    table["pretrain"]["parallel"] |= {"pp": 2}
    assert pools(2).run(pretrain, settings=table, output=str(base / "cut"), die_after=3) == {"killed": 3}
    cut = pools(2).run(pretrain, settings=table, output=str(base / "cut"))
    assert [row["loss"] for row in cut["steps"]] == pytest.approx([row["loss"] for row in one["steps"]], rel=1e-4)
    assert cut["accuracy"] == one["accuracy"]
    # Fitted, grown, handed over.
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
    told = read_runs([base / "large", base / "fit"])
    assert [run.eval.seq_length for run in told] == [SMALL.tokens_of_image] * 2


def held_out(source, table) -> tuple[float, float]:
    """Loss and accuracy of transformers' model on the held-out images."""
    stored = load_file(table["data"]["valid"][0])
    seen, told = stored["images"][:16].float() / 127.5 - 1, stored["labels"][:16]
    with torch.no_grad():
        logits = layer_norm_models.built(source)(seen).logits
    return float(F.cross_entropy(logits, told)), float((logits.argmax(dim=1) == told).float().mean())


def test_the_order_and_the_files(settings, tmp_path):
    table, base = settings
    meshes.init_distributed()
    section = DataSection(train=tuple(table["data"]["train"]), valid=tuple(table["data"]["valid"]), seed=3)
    data = open_image_dataset(section, SMALL, 8)
    count = len(load_file(section.train[0])["labels"])
    turns = [data.train_batch(turn, count, count, 1, 0)[0] for turn in (0, 1, 0)]
    assert torch.equal(turns[0]["tokens"], turns[2]["tokens"])
    assert not torch.equal(turns[0]["tokens"], turns[1]["tokens"])
    rows = [sorted(map(tuple, turn["tokens"].flatten(1).tolist())) for turn in turns[:2]]
    assert rows[0] == rows[1] and len(set(rows[0])) == count
    dealt = [data.train_batch(0, 8, 2, 2, rank) for rank in (0, 1)]
    whole = data.train_batch(0, 8, 8, 1, 0)[0]["labels"]
    assert torch.equal(whole, torch.cat([part["labels"] for pair in zip(*dealt, strict=True) for part in pair]))
    # Prepared again, the files are left; others are refused.
    prepare_images(*drawn(), base / "data", 0.2)
    with pytest.raises(DataError, match="the same images"):
        prepare_images(255 - drawn()[0], drawn()[1], base / "data", 0.2)
    bad = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.tensor([0, 1, 9])}
    save_file(bad, tmp_path / "bad.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    named = tuple(str(tmp_path / f"{name}.safetensors") for name in ("bad", "torn", "none"))
    with pytest.raises(DataError) as error:
        open_image_dataset(DataSection(train=(0.5, *named), pixel_mean=(0.1, 0.2)), SMALL, 8)
    for word in ("n x 1 x 9 x 9", "0 to 4", "torn", "none", "no weights", "data.valid", "pixel_mean"):
        assert word in str(error.value), word
    np.savez(tmp_path / "wrong.npz", images=np.zeros((2, 9, 9)), labels=np.zeros(2))
    with pytest.raises(DataError, match="uint8"):
        read_npz(tmp_path / "wrong.npz")


def test_scikit_learn_s_digits(tmp_path):
    with pytest.raises(DataError, match="pip install"):
        read_digits(tmp_path)
    (tmp_path / DIGITS_FILE).parent.mkdir(parents=True)
    with gzip.open(tmp_path / DIGITS_FILE, "wt") as file:
        file.writelines(",".join(map(str, [*[16, 0, 8, 3] * 16, label])) + "\n" for label in (4, 9))
    pixels, labels = read_digits(tmp_path)
    assert pixels.shape == (2, 1, 8, 8) and labels.tolist() == [4, 9]
    assert pixels[0, 0, 0, :4].tolist() == [255, 0, 128, 48]


def test_accuracy_counts_what_is_shown():
    meshes.init_distributed()
    logits = torch.tensor([[[1.0, 3.0, 9.0], [4.0, 4.0, 0.0], [0.0, 1.0, 0.0]]])  # (1, 3, 3): the last column pads
    told, mask = torch.tensor([[1], [0], [0]]), torch.ones(3, 1)
    assert accuracy(logits, told, mask, 2, meshes.build_mesh(1, 1)) == pytest.approx(2 / 3)
    assert accuracy(logits, told, torch.tensor([[1.0], [0], [1]]), 2, meshes.build_mesh(1, 1)) == pytest.approx(1 / 2)
