"""Positions of tokens in models that drop or merge tokens by what an image shows, image by image."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from tests.capture.models import kept, softmax_by_hand
from visionattn.capture import ClassRow, FullAttention, HeadMean, PatchRow, capture
from visionattn.capture import survey as sites
from visionattn.capture import token_positions as positions
from visionattn.errors import MapWarning, UsageError
from visionattn.maps import (
    Chefer,
    DinoHeads,
    EigenCAM,
    GradCAM,
    GradientAttention,
    GradientRollout,
    LayerCAM,
    RawAttention,
    Rollout,
    ScoreCAM,
    ValueNorm,
)

close = torch.testing.assert_close
KEEP = 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.seen = None

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        self.seen = query.detach(), key.detach()
        return x + self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def gather(x, scores, keep=KEEP):
    picked = scores.topk(keep).indices
    return x.gather(1, picked[..., None].expand(-1, -1, x.shape[2])), picked


def take_along(x, scores):
    picked = scores.argsort(descending=True)[:, :KEEP]
    return torch.take_along_dim(x, picked[..., None], 1), picked


def index(x, scores):
    picked = scores.sort(descending=True, dim=1)[1][:, :KEEP].sort().values
    return x[torch.arange(len(x))[:, None], picked], picked


def flat_index(x, scores):
    picked = scores.topk(KEEP, sorted=False).indices
    flat = picked + torch.arange(len(x))[:, None] * x.shape[1]
    return x.reshape(-1, x.shape[2])[flat.reshape(-1)].reshape(len(x), KEEP, -1), picked


def mask(x, scores):
    chosen = scores >= scores.topk(KEEP).values[:, -1:]
    return x[chosen].reshape(len(x), KEEP, -1), chosen.nonzero()[:, 1].reshape(len(x), KEEP)


PICKS = {pick.__name__: pick for pick in (gather, take_along, index, flat_index, mask)}


class Prune(nn.Module):
    def __init__(self, pick, class_token, rest):
        super().__init__()
        self.pick, self.first, self.rest = pick, int(class_token), rest
        self.picked = None

    def forward(self, x):
        patches = x[:, self.first :]
        scores = patches[..., 0]
        chosen, self.picked = self.pick(patches, scores)
        parts = [x[:, : self.first], chosen]
        if self.rest:  # as in EViT, one token stands for all others
            parts.append((patches * scores.softmax(1)[..., None]).sum(1, keepdim=True))
        return torch.cat(parts, 1)


class Pruning(nn.Module):
    """4 × 6 patches, of which six remain after the first layer, different ones in every image (after Liang et al. 2022,
    2202.07800)."""

    def __init__(self, pick=gather, *, class_token=True, rest=False):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 16)) if class_token else None
        self.first, self.prune, self.last = Attention(), Prune(pick, class_token, rest), Attention()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 7)

    def tokens(self, images):
        x = self.embed(images).flatten(2).mT
        return x if self.class_token is None else torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)

    def forward(self, images):
        x = self.norm(self.last(self.prune(self.first(self.tokens(images)))))
        return self.head(x.mean(1) if self.class_token is None else x[:, 0])


def pruning(*args, **options):
    torch.manual_seed(0)
    return models.stirred(Pruning(*args, **options))


images_of = functools.partial(models.pictures, (32, 48))


def on_cells(values, picked):
    """Place one value per picked token on a 4 × 6 grid."""
    grid = torch.zeros(len(values), 24)
    for b in range(len(values)):
        for place, cell in enumerate(picked[b].tolist()):
            grid[b, cell] = values[b, place]
    return grid.reshape(-1, 4, 6)


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("rest", [False, True], ids=["dropped", "fused"])
def test_remaining_tokens_keep_their_positions_in_every_image(pick, rest):
    model = pruning(PICKS[pick], rest=rest)
    for seed in (1, 2):  # no survey of other images is cached
        images = images_of(batch=3, seed=seed)
        first, *_, last = kept(
            model, images, FullAttention()
        )  # the weight between them is that of the token for all others
        picked = model.prune.picked
        assert len({tuple(cells) for cells in picked.sort().values.tolist()}) == 3
        assert (first.grid, last.grid) == ((4, 6), (4, 6))
        assert (first.num_prefix_tokens, last.num_prefix_tokens) == (1, 1)
        expected = [[-1, *cells, *([-1] if rest else [])] for cells in picked.tolist()]
        assert last.keys.images(3)[:, 0].tolist() == expected
        assert last.queries.images(3)[:, 0].tolist() == expected
        assert first.keys.in_order
        weights = softmax_by_hand(*model.last.seen)
        close(last.weights[:, 0].double(), weights, atol=1e-5, rtol=0)
        maps = RawAttention()(model, images)
        close(maps.raw.double(), on_cells(weights.mean(1)[:, 0, 1 : 1 + KEEP], picked).double(), atol=1e-5, rtol=0)


def test_tokens_that_remain_after_two_reductions_keep_their_positions():
    class Twice(Pruning):
        def __init__(self):
            super().__init__()
            self.again, self.third = Prune(functools.partial(gather, keep=3), True, False), Attention()

        def forward(self, images):
            x = self.last(self.prune(self.first(self.tokens(images))))
            return self.third(self.again(x))

    torch.manual_seed(0)
    model = models.stirred(Twice())
    third = kept(model, images_of(batch=3), ClassRow())[-1]
    assert (third.name, third.grid) == ("third", (4, 6))
    assert third.keys.images(3)[:, 0, 1:].tolist() == model.prune.picked.gather(1, model.again.picked).tolist()


def merge(x, scores):
    """Merge some of every second token into the most similar of the others (Bolya et al. 2023, 2210.09461)."""
    source, target = x[:, ::2], x[:, 1::2]
    likeness, likest = (F.normalize(source, dim=2) @ F.normalize(target, dim=2).mT).max(2)
    order = likeness.argsort(descending=True)
    merged, left = order[:, :KEEP], order[:, KEEP:]
    into, away, stay = (which[..., None].expand(-1, -1, 16) for which in (likest.gather(1, merged), merged, left))
    target = target.scatter_reduce(1, into, source.gather(1, away), "mean")
    return torch.cat([source.gather(1, stay), target], 1), torch.cat(
        [2 * left, 2 * torch.arange(12).expand(len(x), -1) + 1], 1
    )


def test_merged_tokens_have_the_positions_of_the_tokens_they_were_merged_into():
    model = pruning(merge)
    _, last = kept(model, images_of(batch=3), FullAttention())
    assert last.grid == (4, 6)
    assert last.keys.images(3)[:, 0].tolist() == [[-1, *cells] for cells in model.prune.picked.tolist()]
    assert last.keys.index_BWN is not None


def test_the_grid_is_that_of_the_image_when_whole_rows_and_columns_are_dropped():
    model = pruning()
    with torch.no_grad():  # scores are the brightness of the patch
        model.embed.weight[0], model.embed.bias[0] = 1, 0
        model.first.proj.weight.zero_()
    images = torch.zeros(2, 3, 32, 48)
    images[0, :, 8:24, 24:48] = 1 + torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    images[1, :, 16:32, 0:24] = 1 + torch.rand(16, 24, generator=torch.Generator().manual_seed(1))
    _, last = kept(model, images, ClassRow())
    assert last.grid == (4, 6)
    shown = last.keys.to_grid(last.weights.mean(2)) > 0
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, 1:3, 3:], expected[1, 2:, :3] = True, True
    assert torch.equal(shown, expected)


METHODS = {
    "raw": RawAttention,
    "dino": DinoHeads,
    "value_norm": ValueNorm,
    "rollout": Rollout,
    "grad_attention": GradientAttention,
    "grad_rollout": GradientRollout,
    "chefer": Chefer,
    "gradcam": lambda: GradCAM("prune"),
    "layercam": lambda: LayerCAM("prune"),
    "eigencam": lambda: EigenCAM("prune"),
    "scorecam": lambda: ScoreCAM("prune"),
}


@pytest.mark.parametrize("rest", [False, True], ids=["dropped", "fused"])
@pytest.mark.parametrize("name", METHODS)
def test_the_maps_of_a_batch_equal_the_maps_of_its_images(name, rest):
    model, images = pruning(rest=rest), images_of(batch=3)
    method = METHODS[name]()
    with torch.no_grad():
        model(images)
    picked = model.prune.picked
    together = method(model, images, target=3)
    assert together.raw.shape == (3, 4, 6)
    for image, raw, cells in zip(images, together.raw, picked, strict=True):
        close(method(model, image[None], target=3).raw[0], raw, atol=1e-5, rtol=1e-3)
        if name not in ("rollout", "grad_rollout", "chefer"):  # which also use the first layer
            dropped = torch.ones(24, dtype=torch.bool)
            dropped[cells] = False
            assert not raw.flatten()[dropped].any()


def test_rollout_gives_dropped_tokens_their_earlier_relevance():
    model, images = pruning(), images_of(batch=3)
    first, last = (record.weights[:, 0] for record in kept(model, images, HeadMean()))
    expected = torch.zeros(3, 24)
    for b, cells in enumerate(model.prune.picked.tolist()):
        tokens = [0, *(cell + 1 for cell in cells)]
        row = torch.zeros(25)
        row[0] = 0.5
        for place, token in enumerate(tokens):
            row[token] += 0.5 * last[b, 0, place]
        expected[b] = (0.5 * row + 0.5 * row @ first[b])[1:]
    close(Rollout()(model, images).raw.flatten(1), expected, atol=1e-5, rtol=0)


def test_without_a_class_token_rollout_starts_on_the_remaining_tokens():
    model, images = pruning(class_token=False), images_of(batch=3)
    first, last = (record.weights[:, 0] for record in kept(model, images, HeadMean()))
    expected = torch.zeros(3, 24)
    for b, cells in enumerate(model.prune.picked.tolist()):
        row = torch.zeros(24)
        for place, cell in enumerate(cells):
            row[cell] = 0.5 / KEEP + 0.5 * last[b, :, place].mean()
        expected[b] = 0.5 * row + 0.5 * row @ first[b]
    close(Rollout()(model, images).raw.flatten(1), expected, atol=1e-5, rtol=0)


def test_a_patch_that_remains_in_one_image_only_has_zero_rows_in_the_others():
    model, images = pruning(), images_of(batch=3)
    full = kept(model, images, FullAttention())[1].weights[:, 0]
    picked = model.prune.picked.tolist()
    cell = next(cell for cell in picked[1] if cell not in picked[0])
    row = kept(model, images, PatchRow(*divmod(cell, 6)))[1].weights[:, 0]
    for b in range(3):
        expected = full[b, :, 1 + picked[b].index(cell)] if cell in picked[b] else torch.zeros(2, 1 + KEEP)
        close(row[b], expected, atol=1e-6, rtol=0)


def test_capture_leaves_the_output_and_the_model_unchanged():
    model, images = pruning(rest=True), images_of(batch=3)
    before = models.state_of(model)
    with torch.no_grad():
        expected = model(images)
        with capture(model, FullAttention()):
            assert torch.equal(model(images), expected)
    models.assert_same_state(before, models.state_of(model))


def test_a_fixed_choice_of_tokens_is_followed_and_cached(monkeypatch):
    class Fixed(Pruning):
        def __init__(self):
            super().__init__(self.by_order)
            self.register_buffer("order", torch.tensor([5, 0, 7, 22, 23, 11]))

        def by_order(self, x, scores):
            return x[:, self.order], self.order.expand(len(x), -1)

    torch.manual_seed(0)
    model, images = models.stirred(Fixed()), images_of(batch=2)
    runs = []
    plain = sites._run_survey
    monkeypatch.setattr(sites, "_run_survey", lambda *args: runs.append(1) or plain(*args))
    for _ in range(3):
        _, last = kept(model, images, ClassRow())
    assert len(runs) == 1
    assert last.grid == (4, 6)
    assert last.keys.index_WN.tolist() == [[-1, 5, 0, 7, 22, 23, 11]]


def test_a_call_whose_layout_differs_between_images_is_reported():
    class Fickle(Pruning):
        """Attends over all tokens of a dark image, and over six tokens of a bright one."""

        def forward(self, images):
            x = self.embed(images).flatten(2).mT
            pruned = self.prune(x)
            if images.mean() > 0:
                return self.head(self.last(pruned).mean(1))
            return self.head(self.last(x).mean(1))

    torch.manual_seed(0)
    model = models.stirred(Fickle(class_token=False))
    images = images_of(batch=2)
    images[0] += 9
    message = "last: its attention differs between the images of a batch"
    with pytest.raises(UsageError, match=message), torch.no_grad(), capture(model):
        model(images)


def test_a_function_that_cannot_be_followed_is_warned_of():
    x = torch.zeros(1, 2, 2)
    positions.cast(x, torch.zeros(1, 2, 2, dtype=torch.complex64))

    def view(value):
        raise RuntimeError("no complex form")

    with pytest.warns(MapWarning, match=r"could not be followed through view \(no complex form\)"):
        positions.follow(view, (x,), {}, torch.zeros(4))
