"""Official LiGO to the letter, as a mode of our operator (`method = "ligo"`): BERT against its own numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from megatron_ligo.arch.spec import Use
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests.growth import official_ligo
from tests.models.factored import fit_cases
from tests.tiny_models import Memory

MATRICES = ("q", "k", "v", "o", "up", "down")


@pytest.fixture(params=official_ligo.FILES, ids=lambda path: path.stem)
def case(request) -> official_ligo.Case:
    return official_ligo.load(request.param)


def state_of(reader) -> dict[str, torch.Tensor]:
    """Its tensors under Hugging Face's names."""
    items = stored_tensors(reader.arch, reader.model_config, "hf")
    return {
        name: item.assemble([reader.read(key) for key in item.keys], reader.model_config)
        for name, item in items.items()
    }


def logits(reader, ids) -> torch.Tensor:
    """May be differentiated by the reader's tensors."""
    return functional_call(official_ligo.bert(reader.model_config), state_of(reader), (ids,)).logits


def changed(case: official_ligo.Case, tensors: dict[str, torch.Tensor]) -> official_ligo.Given:
    """The case's operator with other tensors in place of some."""
    operator = case.operator
    return official_ligo.Given(operator.small, operator.large, operator.settings, operator.tensors | tensors)


def test_the_settings_are_the_published_ones(case):
    """Maps of their own for q, k and v, one for the head's transform, tied; depth weights for weights and biases."""
    operator, layers = case.operator, case.operator.large.num_layers
    assert set(operator.maps) == {"residual", "q", "k", "v", "ffn", "head"}
    widths = [name for name in operator.shapes() if name.startswith("width.")]
    assert len(widths) == 2 + 4 * layers
    assert all(name.endswith("expand") for name in widths)
    assert sum(name.startswith("depth.") for name in operator.shapes()) == 16
    frozen = operator.count_parameters()["width.residual.expand"]
    assert frozen == (operator.large.hidden_size - operator.small.hidden_size) * operator.small.hidden_size


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_materialised(case, dtype, rtol):
    source = Memory(case.source.model_config, {key: tensor.to(dtype) for key, tensor in case.source.tensors.items()})
    operator = changed(case, {name: tensor.to(dtype) for name, tensor in case.operator.tensors.items()})
    grown = GrownReader(operator, source)
    assert set(grown.keys()) == set(case.expected)
    for key, expected in case.expected.items():
        result = grown.read(key)
        assert result.dtype == dtype
        assert torch.allclose(result.double(), expected, rtol=rtol, atol=rtol), key


def test_materialised_from_bf16(case):
    source = Memory(case.source.model_config, {key: tensor.bfloat16() for key, tensor in case.source.tensors.items()})
    grown = GrownReader(case.operator, source)
    for key, expected in case.expected.items():
        difference = (grown.read(key).double() - expected).square().mean().sqrt()
        assert difference <= 0.01 * expected.square().mean().sqrt(), key


def test_a_wrong_map_is_detected(case):
    """The negative control: each map and each depth weight is read by something."""
    for name, tensor in case.operator.tensors.items():
        grown = GrownReader(changed(case, {name: tensor + 1e-6}), case.source)
        wrong = [key for key, expected in case.expected.items() if not torch.allclose(grown.read(key), expected, 1e-12)]
        assert wrong, name


def test_forward(case):
    with torch.no_grad():
        small, large = logits(case.source, case.ids), logits(GrownReader(case.operator, case.source), case.ids)
    assert torch.allclose(small, case.logits_small, rtol=1e-12, atol=1e-13)
    assert torch.allclose(large, case.logits_large, rtol=1e-12, atol=1e-13)


LAYOUTS = {"one process": {}, "stages": {"pp": 2}, "heads": {}, "heads and stages": {"pp": 2}}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("path", official_ligo.FILES, ids=lambda path: path.stem)
def test_sharded(pools, path, kind):
    """The fit's own model, in fp32: its loss, and the weights that its ranks' parts of the operator give."""
    layout = dict(LAYOUTS[kind])
    own = head_dim = official_ligo.head_dim_of(path)
    large = official_ligo.load(path).operator.large
    if kind == "heads":
        layout["tp"] = next(tp for tp in range(2, 100) if large.num_heads % tp == 0 and large.ffn_size % tp == 0)
    if kind == "heads and stages":
        tp = layout["tp"] = next(tp for tp in range(2, 100) if large.ffn_size % tp == 0)
        # Of a size that the ranks can share.
        head_dim = next(s for s in official_ligo.head_dims(path) if s <= own and large.hidden_size // s % tp == 0)
    case = official_ligo.load(path, head_dim)
    world = layout.get("tp", 1) * layout.get("pp", 1)
    loss, grown = pools(world).run(fit_cases.official_numbers, path=str(path), head_dim=head_dim, **layout)
    labels = case.ids.roll(1, dims=1)
    with torch.no_grad():
        result = logits(Memory(case.operator.large, case.expected), case.ids)
    if head_dim == own:
        assert torch.allclose(result, case.logits_large, rtol=1e-12, atol=1e-13)
    expected = float(F.cross_entropy(result.flatten(0, 1), labels.flatten()))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert grown.keys() == case.expected.keys()
    for key, tensor in case.expected.items():
        assert torch.allclose(grown[key].double(), tensor, rtol=1e-5, atol=1e-6), key


def test_on_the_fly_is_materialised(case):
    """Every linear applied factor by factor gives what the built matrix gives."""
    grown = GrownReader(case.operator, case.source)
    model = official_ligo.bert(grown.model_config)
    model.load_state_dict(state_of(grown))
    for key in grown.keys():  # noqa: SIM118
        param = grown.param(key)
        if len(param.axes) == 2 and param.axes[1].use is Use.INPUT:
            name = grown.arch.stored_name(key, grown.model_config, "hf").removesuffix(".weight")
            module = model.get_submodule(name)
            module.forward = factored(case, key, module.bias)
    with torch.no_grad():
        assert torch.allclose(model(case.ids).logits, case.logits_large, rtol=1e-12, atol=1e-13)


def factored(case: official_ligo.Case, key: str, bias):
    operator = case.operator
    param = operator.arch.param(key)
    mixed = operator.mix_layers(key, case.source.read)
    layer = int(key.split(".")[1]) if param.in_layer else None

    def matrix(axis) -> torch.Tensor:
        lift = operator.space_maps.lift(axis)
        return torch.eye(operator.large.vocab_size).double() if lift is None else operator.matrix(layer)(lift, axis.use)

    out, into = (matrix(axis) for axis in param.axes)
    return lambda x: F.linear(F.linear(x @ into, mixed), out, bias)


def test_gradients_are_the_central_differences(case):
    labels = case.ids.roll(1, dims=1)

    def loss(operator: official_ligo.Given) -> torch.Tensor:
        result = logits(GrownReader(operator, case.source), case.ids)
        return F.cross_entropy(result.flatten(0, 1), labels.flatten())

    tried = {"width.residual.expand": [(9, 3), (11, 0)], "depth.v": [(2, 1)], "depth.up_bias": [(3, 0)]}
    for name, places in tried.items():
        tensor = case.operator.tensors[name]
        wanted = tensor.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(changed(case, {name: wanted})), wanted)
        for place in places:
            ends = []
            for step in (1e-6, -1e-6):
                moved = tensor.clone()
                moved[place] += step
                with torch.no_grad():
                    ends.append(float(loss(changed(case, {name: moved}))))
            difference = (ends[0] - ends[1]) / 2e-6
            assert float(gradient[place]) == pytest.approx(difference, rel=1e-6, abs=2e-9), (name, place)


def test_growing_a_matrix_is_the_kronecker_product(case):
    """vec(B W A^T) = (A x B) vec(W), columns one below the other."""
    operator = case.operator
    out, into = operator.tensor("width.ffn.1.expand"), operator.tensor("width.residual.expand")
    mixed = operator.mix_layers("layers.1.up", case.source.read)
    expected = torch.kron(into, out) @ mixed.T.reshape(-1)
    assert torch.allclose(operator.grow("layers.1.up", mixed).T.reshape(-1), expected, rtol=1e-12, atol=1e-14)


def one_hot_depth(operator: official_ligo.Given) -> dict[str, torch.Tensor]:
    """Stacking, for every row."""
    source = torch.arange(operator.large.num_layers) % operator.small.num_layers
    weights = F.one_hot(source, operator.small.num_layers).double()
    return {name: weights for name in operator.tensors if name.startswith("depth.")}


def test_one_hot_depth_at_equal_widths_is_a_stack(case):
    operator = case.operator
    large = replace(operator.small, num_layers=operator.large.num_layers)
    widths = {name: torch.eye(t.shape[1]).double() for name, t in operator.tensors.items() if name.startswith("width.")}
    grown = GrownReader(
        official_ligo.Given(operator.small, large, operator.settings, widths | one_hot_depth(operator)), case.source
    )
    for key in grown.keys():  # noqa: SIM118
        layer = int(key.split(".")[1]) if key.startswith("layers.") else None
        source = key if layer is None else grown.param(key).key.format(layer % operator.small.num_layers)
        assert torch.equal(grown.read(key), case.source.read(source))


def test_equal_sizes_are_a_copy(case):
    small, settings = case.source.model_config, case.operator.settings
    shapes = build_initial_operator(small, LargeSection(), replace(settings, depth_init="stack")).shapes()
    tensors = {name: torch.eye(*shape).double() for name, shape in shapes.items()}
    grown = GrownReader(official_ligo.Given(small, small, settings, tensors), case.source)
    for key in grown.keys():  # noqa: SIM118
        assert torch.equal(grown.read(key), case.source.read(key))


def test_rows_of_zeros_pad_a_stack(case):
    operator = case.operator
    padded = {
        name: official_ligo.with_identity(torch.zeros(t.shape[0] - t.shape[1], t.shape[1], dtype=t.dtype))
        for name, t in operator.tensors.items()
        if name.startswith("width.")
    }
    tensors = padded | one_hot_depth(operator)
    last = operator.large.num_layers - 1
    below = last % operator.small.num_layers
    grown = GrownReader(official_ligo.Given(operator.small, operator.large, operator.settings, tensors), case.source)
    for row in MATRICES:
        result, source = grown.read(f"layers.{last}.{row}"), case.source.read(f"layers.{below}.{row}")
        corner = result[: source.shape[0], : source.shape[1]]
        assert torch.equal(corner, source)
        assert int(result.count_nonzero()) == int(source.count_nonzero())


def test_depth_before_width_with_maps_of_the_target_layer(case):
    """Shared maps commute with the mixing of layers; maps of each layer's own do not, and are the large layer's."""
    operator = case.operator
    shared = {
        name: operator.tensors[name.replace(name.split(".")[2], "0", 1)] if name.count(".") == 3 else tensor
        for name, tensor in operator.tensors.items()
    }

    def both(tensors, mapped_as):
        """A large layer's query from mixed layers, and from layers grown by the map of each and then mixed."""
        given = official_ligo.Given(operator.small, operator.large, operator.settings, tensors)
        residual, weights = tensors["width.residual.expand"], tensors["depth.q"][3]
        grown = [
            weight * tensors[f"width.q.{mapped_as(i)}.expand"] @ case.source.read(f"layers.{i}.q") @ residual.T
            for i, weight in enumerate(weights)
        ]
        return GrownReader(given, case.source).read("layers.3.q"), sum(grown)

    assert torch.allclose(*both(shared, lambda i: i), rtol=1e-12, atol=1e-13)
    assert torch.allclose(*both(operator.tensors, lambda i: 3), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(*both(operator.tensors, lambda i: i), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("contract", ["tied", "free"])
def test_copies_keep_the_function_only_if_readers_share_them(case, contract):
    """Balanced whole copies: read by the transpose, as published, the logits are others; by the inverse, the same."""
    small = case.source.model_config
    large = LargeSection(hidden_size=2 * small.hidden_size, num_heads=2 * small.num_heads, ffn_size=2 * small.ffn_size)
    settings = OperatorSection(
        method="ligo",
        width_init="copy",
        depth_init="interlace",
        contract=contract,
        structure="heads",
        identity="learned",
    )
    with torch.no_grad():
        before = logits(case.source, case.ids)
        after = logits(GrownReader(build_initial_operator(small, large, settings), case.source), case.ids)
    gap = float((before - after).abs().max())
    assert gap < 1e-13 if contract == "free" else gap > 0.1


def test_sizes_that_the_official_code_accepts_are_refused(case):
    small = case.source.model_config
    ligo = OperatorSection(method="ligo")
    wrong = {
        "head_dim": LargeSection(hidden_size=small.hidden_size + small.num_heads),
        "hidden_size": LargeSection(hidden_size=small.head_dim, num_heads=1),
        "vocab_size": LargeSection(vocab_size=small.vocab_size - 1),
        "num_layers": LargeSection(num_layers=1),
    }
    for name, large in wrong.items():
        with pytest.raises(ConfigError) as error:
            build_initial_operator(small, large, ligo)
        assert any(name in problem.where for problem in error.value.problems)
    # interlace is right at any ratio of layers, where the official one reads beyond the small model's last.
    operator = build_initial_operator(small, LargeSection(num_layers=5), replace(ligo, depth_init="interlace"))
    assert operator.tensor("depth.q").argmax(dim=1).tolist() == [i * small.num_layers // 5 for i in range(5)]


def test_one_step_of_the_optimizer(case):
    """AdamW's first step moves a weight by the rate and its decay, whatever the gradient's size."""
    lr, eps, decay = 2e-4, 1e-6, 0.1
    before = case.operator.tensor("depth.q")
    weights = torch.nn.Parameter(before.clone())
    result = logits(GrownReader(changed(case, {"depth.q": weights}), case.source), case.ids)
    F.cross_entropy(result.flatten(0, 1), case.ids.roll(1, dims=1).flatten()).backward()
    gradient = weights.grad.clone()
    torch.optim.AdamW([weights], lr=lr, eps=eps, weight_decay=decay, betas=(0.9, 0.999)).step()
    expected = before * (1 - lr * decay) - lr * gradient / (gradient.abs() + eps)
    assert torch.allclose(weights.detach(), expected, rtol=0, atol=1e-16)
