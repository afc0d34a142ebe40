"""Test the decoder of the query detector against its equations."""

import math

import torch

from tests.models.detectors.small import batch, query
from visionattn.models.detectors.decoder import Decoder, DecoderLayer, sine


def test_boxes_are_refined_layer_by_layer():
    torch.manual_seed(0)
    decoder = Decoder(16, 3, levels=1, layers=2, heads=2, points=2, hidden=16).eval()
    queries, boxes, maps = torch.randn(1, 4, 16), 0.2 + 0.6 * torch.rand(1, 4, 4), [torch.randn(1, 16, 6, 6)]
    first, second = decoder(queries, boxes, maps)
    torch.testing.assert_close(first.boxes, boxes, atol=1e-5, rtol=1e-5)  # before training, boxes do not move
    with torch.no_grad():
        for move, step in zip(decoder.move, (0.3, -0.2), strict=True):
            move[-1].bias.fill_(step)
    first, second = decoder(queries, boxes, maps)
    torch.testing.assert_close(first.boxes, (boxes.logit() + 0.3).sigmoid())
    torch.testing.assert_close(second.boxes, (boxes.logit() + 0.1).sigmoid())
    (gradient,) = torch.autograd.grad(second.boxes.sum(), decoder.move[0][-1].bias)
    assert gradient.abs().sum() > 0  # the second layer's loss also trains the first layer's box
    (no_gradient,) = torch.autograd.grad(
        decoder(queries, boxes, maps)[1].logits.sum(), decoder.move[0][-1].bias, allow_unused=True
    )
    assert no_gradient is None  # no gradient flows from the attention into the box around which it samples


def test_attention_gets_the_sizes_of_maps_that_extend_beyond_the_image():
    detector = query().eval()
    spans_of_calls = []
    for layer in detector.decoder.layers:
        layer.look.register_forward_pre_hook(lambda _, args: spans_of_calls.append(args[3]))
    images, boxes, labels = batch(1)
    with torch.no_grad():
        detector(images[..., :40, :])
        detector.losses(images[..., :40, :], [b[:0] for b in boxes], [n[:0] for n in labels])
    assert len(spans_of_calls) == 4
    for spans in spans_of_calls:
        torch.testing.assert_close(spans, torch.tensor([[1, 1], [1, 48 / 40], [1, 64 / 40]]))


def test_layer_is_self_attention_then_cross_attention_then_feed_forward():
    torch.manual_seed(0)
    layer = DecoderLayer(8, levels=1, heads=2, points=2, hidden=16).eval()
    query_BQC, position, boxes = torch.randn(1, 5, 8), torch.randn(1, 5, 8), 0.2 + 0.6 * torch.rand(1, 5, 4)
    maps, hidden = [torch.randn(1, 8, 6, 6)], torch.rand(5, 5) < 0.3
    hidden.fill_diagonal_(False)
    with torch.no_grad():
        placed = query_BQC + position
        weights, biases = layer.among.in_proj_weight.chunk(3), layer.among.in_proj_bias.chunk(3)
        inputs = (placed, placed, query_BQC)
        q, k, v = ((x @ w.T + b).view(5, 2, 4).transpose(0, 1) for x, w, b in zip(inputs, weights, biases, strict=True))
        logits = (q @ k.mT / 2).masked_fill(hidden, -math.inf)
        among = layer.among.out_proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(1, 5, 8))
        first = layer.norms[0](query_BQC + among)
        second = layer.norms[1](first + layer.look(first + position, boxes, maps))
        expected = layer.norms[2](second + layer.feed(second))
        torch.testing.assert_close(layer(query_BQC, position, boxes, maps, hidden, None), expected)


def test_position_encoding_is_sines_of_the_box():
    box = torch.tensor([[[0.1, 0.4, 0.6, 0.9]]])
    (found,) = sine(box, 4)[0]
    expected = []
    for number in box[0, 0].tolist():
        angles = [number * 2 * math.pi / 20 ** (2 * index / 4) for index in range(2)]
        expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    torch.testing.assert_close(found, torch.tensor(expected))
