"""Test attention of positions to positions against slow loops from the papers' equations, and against timm."""

import itertools
import math

import pytest
import torch
from timm.layers import create_attn
from torch import nn

from tests.attention.mechanisms import image, normalised, seeded, weights
from visionattn.attention import BilinearAttention, BottleneckAttention, DualAttention, HaloAttention, NonLocal
from visionattn.capture import FullAttention, capture
from visionattn.errors import UsageError


def softmax(scores):
    """Return the softmax of a list of numbers."""
    largest = max(scores)
    exponentials = [math.exp(score - largest) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def projected(x_CHW, w, name):
    """Compute a 1 × 1 convolution, (C, H, W) → (N, D)."""
    bias = w.get(f"{name}.bias", torch.zeros(()))
    return (w[f"{name}.weight"][:, :, 0, 0] @ x_CHW.flatten(1)).T + bias


def captured(module, x):
    """Return the record of the module's only attention."""
    with torch.no_grad(), capture(module, FullAttention()) as records:
        module(x)
    (record,) = records.attention
    return record


def test_non_local_matches_its_equation_and_is_captured():
    module = seeded(NonLocal, 8, reduction=2)
    x = image(2, 8, 3, 4)
    w = weights(module)
    out, maps = torch.empty_like(x), torch.empty(2, 12, 12, dtype=torch.float64)
    per_channel = {name: value for name, value in w.items() if value.ndim == 1}
    for b in range(2):
        q, k, v = (projected(x[b], w, name) for name in ("t", "p", "g"))
        for n in range(12):
            p = softmax([float(q[n] @ k[m]) / math.sqrt(8) for m in range(12)])
            maps[b, n] = torch.tensor(p)
            y = sum(p[m] * v[m] for m in range(12))
            z = w["z.weight"][:, :, 0, 0] @ y + w["z.bias"]
            out[b, :, n // 4, n % 4] = x[b, :, n // 4, n % 4] + normalised(z, per_channel, "norm")
    torch.testing.assert_close(module(x), out)
    record = captured(module, x)
    assert (record.kind, record.grid) == ("self", (3, 4))
    torch.testing.assert_close(record.weights.double().view(2, 12, 12), maps, atol=1e-6, rtol=1e-5)


def test_non_local_matches_timm():
    module = seeded(NonLocal, 16, reduction=2)
    reference = create_attn("nl", 16, rd_channels=8).double().eval()
    reference.load_state_dict(weights(module))
    x = image(2, 16, 7, 5)
    torch.testing.assert_close(module(x), reference(x))


def test_dual_attention_matches_its_equation_and_is_captured():
    module = seeded(DualAttention, 4, reduction=2)
    x = image(2, 4, 3, 2) / 2
    w = weights(module)
    out, maps = torch.empty_like(x), torch.empty(2, 6, 6, dtype=torch.float64)
    for b in range(2):
        q, k, v = (projected(x[b], w, name) for name in ("query", "key", "value"))
        flat = x[b].flatten(1)
        channels = [softmax([float(flat[c] @ flat[d]) for d in range(4)]) for c in range(4)]
        for n in range(6):
            p = softmax([float(q[n] @ k[m]) for m in range(6)])
            maps[b, n] = torch.tensor(p)
            over_positions = sum(p[m] * v[m] for m in range(6))
            for c in range(4):
                over_channels = sum(channels[c][d] * flat[d, n] for d in range(4))
                out[b, c].view(-1)[n] = flat[c, n] + w["alpha"] * over_positions[c] + w["beta"] * over_channels
    torch.testing.assert_close(module(x), out)
    record = captured(module, x)
    assert (record.kind, record.grid) == ("self", (3, 2))
    torch.testing.assert_close(record.weights.double().view(2, 6, 6), maps, atol=1e-6, rtol=1e-5)


def test_dual_attention_starts_as_the_identity():
    x = image(2, 8, 3, 5)
    assert torch.equal(DualAttention(8).double()(x), x)


@pytest.mark.parametrize(("size", "height", "width"), [(4, 4, 4), (4, 3, 5), (3, 5, 1)])
def test_bottleneck_attention_matches_its_equation_and_is_captured(size, height, width):
    module = seeded(BottleneckAttention, 8, num_heads=2, size=size)
    x = image(2, 8, height, width)
    w = weights(module)
    n = height * width

    def distance(table, offset, length):
        """Interpolate the values learned for `size` positions to `length` positions, with aligned ends."""
        if length == 1:
            return table[size - 1]  # the same for all keys, so the softmax does not depend on this value
        index = (size - 1) + offset * (size - 1) / (length - 1)
        low = min(math.floor(index + 1e-9), len(table) - 1)
        high = min(low + 1, len(table) - 1)
        return table[low] + (index - low) * (table[high] - table[low])

    out, maps = torch.empty_like(x), torch.empty(2, 2, n, n, dtype=torch.float64)
    for b, head in itertools.product(range(2), range(2)):
        q, k, v = projected(x[b], w, "qkv").unflatten(1, (3, 2, 4)).unbind(1)
        q, k, v = q[:, head], k[:, head], v[:, head]
        for i in range(n):
            scores = []
            for j in range(n):
                rows, columns = j // width - i // width, j % width - i % width
                r = distance(w["pos_embed.height_rel"], rows, height)
                r = r + distance(w["pos_embed.width_rel"], columns, width)
                scores.append(float(q[i] @ k[j]) / 2 + float(q[i] @ r))  # √D = 2
            p = softmax(scores)
            maps[b, head, i] = torch.tensor(p)
            y = sum(p[j] * v[j] for j in range(n))
            out[b, 4 * head : 4 * head + 4, i // width, i % width] = y
    torch.testing.assert_close(module(x), out)
    record = captured(module, x)
    assert (record.kind, record.grid, record.heads) == ("self", (height, width), 2)
    torch.testing.assert_close(record.weights.double().view(2, 2, n, n), maps, atol=1e-6, rtol=1e-5)


def test_bottleneck_attention_matches_timm_at_the_learned_size():
    module = seeded(BottleneckAttention, 16, size=6)
    reference = create_attn("bottleneck", 16, feat_size=(6, 6)).double()
    reference.load_state_dict(weights(module))
    x = image(2, 16, 6, 6)
    torch.testing.assert_close(module(x), reference(x))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 3), (1, 6)])
def test_halo_attention_matches_its_equation(height, width):
    block, halo = 2, 1
    module = seeded(HaloAttention, 8, num_heads=2, block_size=block, halo_size=halo)
    x = image(2, 8, height, width)
    w = weights(module)
    window = block + 2 * halo
    out = torch.empty_like(x)
    for b, head in itertools.product(range(2), range(2)):
        q = projected(x[b], w, "q")[:, 4 * head : 4 * head + 4]
        # timm's projection stores k and v of a head next to each other
        k, v = projected(x[b], w, "kv")[:, 8 * head : 8 * head + 8].split(4, 1)
        zeros = torch.zeros(4, dtype=torch.float64)  # k and v outside the image
        for i, j in itertools.product(range(height), range(width)):
            top, left = i // block * block - halo, j // block * block - halo
            scores, values = [], []
            for di, dj in itertools.product(range(window), range(window)):
                row, column = top + di, left + dj
                inside = 0 <= row < height and 0 <= column < width
                key = k[row * width + column] if inside else zeros
                values.append(v[row * width + column] if inside else zeros)
                query = q[i * width + j]
                r = w["pos_embed.height_rel"][di - i % block + window - 1]
                r = r + w["pos_embed.width_rel"][dj - j % block + window - 1]
                scores.append(float(query @ key) / 2 + float(query @ r))  # √D = 2
            p = softmax(scores)
            out[b, 4 * head : 4 * head + 4, i, j] = sum(p[m] * values[m] for m in range(window**2))
    torch.testing.assert_close(module(x), out)


def test_halo_attention_is_captured_block_by_block():
    record = captured(seeded(HaloAttention, 8, block_size=4, halo_size=1), image(1, 8, 8, 12))
    assert (record.kind, record.grid, record.heads) == ("self", (8, 12), 8)
    assert record.windowed
    assert len(record.keys.index_WN) == 6  # blocks of 4 × 4 on a map of 8 × 12


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3)])
def test_bilinear_attention_matches_its_equation(height, width):
    size, groups = 2, 2
    module = seeded(BilinearAttention, 8, block_size=size, groups=groups, reduction=2)
    x = image(2, 8, height, width)
    w = weights(module)
    # height and width are rounded up to multiples of s = size; a block has `a` rows and `c` columns
    tall, wide = -(-height // size) * size, -(-width // size) * size
    a, c = tall // size, wide // size

    def layer(planes, name):
        out = (w[f"{name}.conv.weight"][:, :, 0, 0] @ planes.flatten(1)).T
        per_channel = {key: value for key, value in w.items() if value.ndim == 1}
        return torch.relu(normalised(out, per_channel, f"{name}.bn")).T.unflatten(1, planes.shape[1:])

    out = torch.empty_like(x)
    for b in range(2):
        small = layer(x[b], "conv1")
        inner = torch.empty(4, tall, wide, dtype=torch.float64)
        for i, j in itertools.product(range(tall), range(wide)):
            inner[:, i, j] = small[:, min(i, height - 1), min(j, width - 1)]
        guide = layer(inner, "ba.conv1")
        rows = torch.stack([guide[:, s * a : (s + 1) * a].amax((1, 2)) for s in range(size)], 1)  # (groups, size)
        columns = torch.stack([guide[:, :, s * c : (s + 1) * c].amax((1, 2)) for s in range(size)], 1)
        p = torch.einsum("ogs,gs->o", w["ba.conv_p.weight"][..., 0], rows) + w["ba.conv_p.bias"]
        q = torch.einsum("ogs,gs->o", w["ba.conv_q.weight"][:, :, 0], columns) + w["ba.conv_q.bias"]
        p, q = (torch.sigmoid(logits).view(groups, size, size) for logits in (p, q))
        mixed = torch.zeros_like(inner)
        for r, i, j in itertools.product(range(4), range(tall), range(wide)):
            g, s, t = r // 2, i // a, j // c
            for s2, t2 in itertools.product(range(size), range(size)):
                weight = p[g, s, s2] / p[g, s].sum() * q[g, t2, t] / q[g, :, t].sum()
                mixed[r, i, j] += weight * inner[r, s2 * a + i % a, t2 * c + j % c]
        out[b] = x[b] + layer(layer(mixed[:, :height, :width], "ba.conv2"), "conv2")
    torch.testing.assert_close(module(x), out)


def test_bilinear_attention_matches_timm_at_multiples_of_the_block_size():
    module = seeded(BilinearAttention, 16, reduction=2)
    reference = create_attn("bat", 16, rd_channels=8).double().eval()
    reference.load_state_dict(weights(module))
    x = image(2, 16, 14, 21)
    torch.testing.assert_close(module(x), reference(x))


def test_capture_of_bilinear_attention_raises():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BilinearAttention(8)).eval()
    with pytest.raises(UsageError, match="nothing in this Sequential attends"), torch.no_grad(), capture(model):
        model(torch.randn(1, 3, 14, 14))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BottleneckAttention(7, num_heads=4), "7 channels are not a multiple of num_heads=4; pass a divisor"),
        (lambda: HaloAttention(12, num_heads=8), "12 channels are not a multiple of num_heads=8; pass a divisor"),
        (lambda: BottleneckAttention(8, size=0), "size must be ≥ 1, got 0"),
        (lambda: HaloAttention(8, block_size=0), "block_size must be ≥ 1 and halo_size ≥ 0, got 0 and 3"),
        (lambda: BilinearAttention(8, groups=0), "block_size and groups must be ≥ 1, got 7 and 0"),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
