"""Every encoder against its recording; the global encoder over packed slides, any order, chosen rows, linear memory."""

from __future__ import annotations

import pytest
import torch

from models.encoders import FusionEncoder, GeneEncoder, GlobalEncoder, NeighborEncoder, ProjectionHead
from models.layers import attention as attention_module
from models.layers.position import GridConvolution, grid_neighbors
from models.layers.precision import mean_tokens
from models.layers.transformer import FeedForward, TransformerLayer

NEIGHBOR = "image_encoder.neighbor_encoder."
GLOBAL = "image_encoder.global_encoder."


def layers(count: int, **sizes) -> list[TransformerLayer]:
    return [TransformerLayer(dropout=0.0, **sizes) for _ in range(count)]


@pytest.fixture
def neighbor(golden, tools):
    recording = tools.as_tensors(golden("neighbor_encoder"))
    dim = recording["x"].shape[-1]
    heads, offsets = recording["param/layer.layers.0.0.fn.attention_biases"].shape
    hidden_dim = recording["param/layer.layers.0.1.fn.net.0.weight"].shape[0]
    count = sum(name.endswith("attention_biases") for name in recording if name.startswith("param/"))
    sizes = {"dim": dim, "heads": heads, "hidden_dim": hidden_dim, "grid_side": round(offsets**0.5)}
    encoder = NeighborEncoder(layers=layers(count, **sizes), dim=dim)
    tools.load_part(encoder, recording, reference=NEIGHBOR, ours="neighbor_encoder.")
    return encoder, recording


def test_neighbor_encoder_equals_the_recording(neighbor, tools):
    encoder, recording = neighbor
    tokens = recording["x"].clone().requires_grad_()
    is_valid = recording["mask"] > 0
    found = encoder(tokens, is_valid)
    tools.close(found, recording["out"])
    hidden_rows = ~is_valid.any(dim=1)
    assert hidden_rows.any(), "the recording holds a row without any valid neighbor"
    tools.close(found[hidden_rows], recording["out"][hidden_rows])
    (found * recording["loss_weight"]).sum().backward()
    tools.close(tokens.grad, recording["grad_x"], tolerance=tools.GRADIENT_TOLERANCE)
    tools.check_gradients(encoder, recording, reference=NEIGHBOR, ours="neighbor_encoder.")


def test_neighbor_encoder_without_mask_equals_the_recording(neighbor, tools):
    encoder, recording = neighbor
    tools.close(encoder(recording["x"], None), recording["out_nomask"])
    everything = torch.ones_like(recording["mask"], dtype=torch.bool)
    tools.close(encoder(recording["x"], everything), recording["out_nomask"])


@pytest.fixture
def whole_slide(golden, tools):
    recording = tools.as_tensors(golden("global_encoder"))
    dim = recording["x"].shape[-1]
    hidden_dim = recording["param/layer1.layers.0.1.fn.net.0.weight"].shape[0]
    later = {name.split(".")[2] for name in recording if name.startswith("param/layer2.layers.")}
    sizes = {"dim": dim, "heads": tools.GLOBAL_HEADS, "hidden_dim": hidden_dim}
    encoder = GlobalEncoder(layers=layers(1 + len(later), **sizes), position=GridConvolution(dim=dim), dim=dim)
    tools.load_part(encoder, recording, reference=GLOBAL, ours="global_encoder.")
    return encoder, recording


@pytest.mark.parametrize("padded", [False, True])
def test_global_encoder_equals_the_recording(whole_slide, tools, padded):
    encoder, recording = whole_slide
    features = recording["x"][0].clone().requires_grad_()
    found = encoder(features, recording["position_yx"].flip(1), [len(features)], padded=padded)
    tools.close(found, recording["out"][0])
    (found * recording["loss_weight"][0]).sum().backward()
    tools.close(features.grad, recording["grad_x"][0], tolerance=tools.GRADIENT_TOLERANCE)
    tools.check_gradients(encoder, recording, reference=GLOBAL, ours="global_encoder.")


def test_the_stages_of_the_global_encoder_equal_the_recording(whole_slide, tools):
    encoder, recording = whole_slide
    tokens = encoder.layers[0](recording["x"])
    tools.close(tokens, recording["after_layer1"])
    neighbors = grid_neighbors(recording["position_yx"].flip(1), [tokens.shape[1]])
    tokens = encoder.position(tokens[0], neighbors)[None]
    tools.close(tokens, recording["after_pegh"])
    for layer in encoder.layers[1:]:
        tokens = layer(tokens)
    tools.close(tokens, recording["after_layer2"])


def random_slides(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    cells = torch.cat([torch.randperm(80, generator=generator)[:length] for length in lengths])
    return torch.randn(sum(lengths), 8, generator=generator), torch.stack([cells % 8, cells // 8], dim=1)


def small_encoder(depth: int = 3) -> GlobalEncoder:
    torch.manual_seed(0)
    parts = layers(depth, dim=8, heads=2, hidden_dim=16)
    return GlobalEncoder(layers=parts, position=GridConvolution(dim=8), dim=8)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chosen_rows_of_several_slides_equal_each_slide_by_itself(depth, padded):
    lengths = [30, 1, 12]
    features, grid_xy = random_slides(lengths)
    encoder = small_encoder(depth)
    alone = torch.cat(
        [encoder(x, xy, [len(x)]) for x, xy in zip(features.split(lengths), grid_xy.split(lengths), strict=True)]
    )
    rows = torch.tensor([42, 0, 30, 7, 7])
    torch.testing.assert_close(encoder(features, grid_xy, lengths, rows, padded=padded), alone[rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder(features, grid_xy, lengths, padded=padded), alone, atol=1e-5, rtol=0)


def test_chosen_rows_give_the_gradients_of_all_rows():
    lengths = [20, 9]
    features, grid_xy = random_slides(lengths)
    encoder = small_encoder().double()
    rows = torch.tensor([3, 25, 11])
    weight = torch.randn(3, 8, dtype=torch.float64)
    leaves = list(encoder.parameters())
    chosen = torch.autograd.grad((encoder(features, grid_xy, lengths, rows) * weight).sum(), leaves)
    everything = torch.autograd.grad((encoder(features, grid_xy, lengths)[rows] * weight).sum(), leaves)
    for found, expected in zip(chosen, everything, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_order_of_the_spots_does_not_matter():
    features, grid_xy = random_slides([40])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    encoder = small_encoder().eval()
    found = encoder(features[order], grid_xy[order], [40])
    torch.testing.assert_close(found, encoder(features, grid_xy, [40])[order], atol=1e-5, rtol=0)


def test_evaluation_in_chunks_equals_training_at_once(monkeypatch):
    lengths = [50, 17]
    features, grid_xy = random_slides(lengths)
    encoder = small_encoder().eval()
    at_once = encoder(features, grid_xy, lengths)
    monkeypatch.setattr(attention_module, "CHUNK_ROWS", 16)
    with torch.no_grad():
        found = encoder(features, grid_xy, lengths)
        rows = torch.arange(0, 67, 2)
        chosen = encoder(features, grid_xy, lengths, rows)
    torch.testing.assert_close(found, at_once, atol=1e-5, rtol=0)
    torch.testing.assert_close(chosen, at_once[rows], atol=1e-5, rtol=0)


def test_evaluation_keeps_nothing_of_spots_by_spots():
    """The largest tensor that an evaluation makes is linear in the spots (queries, keys and values together)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    count = 1200
    cells = torch.arange(count)
    grid_xy = torch.stack([cells % 40, cells // 40], dim=1)
    with torch.no_grad(), Largest() as largest:
        small_encoder().eval()(torch.randn(count, 8), grid_xy, [count])
    assert 0 < largest.elements <= 3 * 9 * count


def test_a_global_encoder_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"global_depth is 0.*use_global=False"):
        GlobalEncoder(layers=[], position=GridConvolution(dim=8), dim=8)


def test_half_precision_features_are_widened():
    features, grid_xy = random_slides([10])
    encoder = small_encoder()
    torch.testing.assert_close(encoder(features.half(), grid_xy, [10]), encoder(features.half().float(), grid_xy, [10]))


def test_fusion_equals_the_recording(golden, tools):
    recording = tools.as_tensors(golden("fusion"))
    dim, hidden_dim = recording["x"].shape[-1], recording["param/1.net.0.weight"].shape[0]
    fusion = FusionEncoder(
        layer=TransformerLayer(dim=dim, heads=1, hidden_dim=hidden_dim, dropout=0.0),
        feed_forward=FeedForward(dim=dim, hidden_dim=hidden_dim, dropout=0.0),
    )
    tools.load_part(fusion, recording, reference="trans_encoder.", ours="fusion.")
    tokens = recording["x"].clone().requires_grad_()
    tools.close(fusion.layer(tokens), recording["after_transformer"])
    found = fusion(tokens)
    tools.close(found, recording["out"])
    (found * recording["loss_weight"]).sum().backward()
    tools.close(tokens.grad, recording["grad_x"], tolerance=tools.GRADIENT_TOLERANCE)
    tools.check_gradients(fusion, recording, reference="trans_encoder.", ours="fusion.")


def test_gene_encoder_equals_the_recording(golden, tools):
    recording = tools.as_tensors(golden("gene_encoder"))
    dim, num_genes = recording["param/0.projection.weight"].shape
    hidden_dim = recording["param/1.net.0.weight"].shape[0]
    feed_forward = FeedForward(dim=dim, hidden_dim=hidden_dim, dropout=0.0)
    encoder = GeneEncoder(num_genes=num_genes, dim=dim, dropout=0.0, feed_forward=feed_forward)
    tools.load_part(encoder, recording, reference="gene_encoder.", ours="gene_encoder.")
    expression = recording["x"].clone().requires_grad_()
    tools.close(ProjectionHead.forward(encoder, expression), recording["after_encoder"])
    found = encoder(expression)
    tools.close(found, recording["out"])
    (found * recording["loss_weight"]).sum().backward()
    tools.close(expression.grad, recording["grad_x"], tolerance=tools.GRADIENT_TOLERANCE)
    tools.check_gradients(encoder, recording, reference="gene_encoder.", ours="gene_encoder.")


def test_mean_of_half_precision_tokens_is_float32():
    tokens = torch.randn(2, 300, 4).bfloat16()
    found = mean_tokens(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, tokens.float().mean(dim=1))
    assert mean_tokens(tokens.double()).dtype == torch.float64
