"""Positions of tokens in models that drop or merge different tokens in every image."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from tests.capture.models import kept, softmax_by_hand
from visionattn.capture import ClassRow, FullAttention, HeadMean, PatchRow, capture, token_positions
from visionattn.capture import survey as survey_module
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
KEEP = 6  # patches that remain in each image


class Attention(nn.Module):
    """Self-attention of two heads with a shortcut; `query_and_key` holds the inputs of the last call."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.query_and_key = None

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        self.query_and_key = query.detach(), key.detach()
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
    """Keep the class token and the patches that `pick` chooses; `rest` adds a mean of all patches as one token."""

    def __init__(self, pick, class_token, rest):
        super().__init__()
        self.pick, self.first, self.rest = pick, int(class_token), rest
        self.picked = None

    def forward(self, x):
        patches = x[:, self.first :]
        scores = patches[..., 0]
        chosen, self.picked = self.pick(patches, scores)
        parts = [x[:, : self.first], chosen]
        if self.rest:  # as in EViT
            parts.append((patches * scores.softmax(1)[..., None]).sum(1, keepdim=True))
        return torch.cat(parts, 1)


class Pruning(nn.Module):
    """4 × 6 patches, of which six remain after the first layer. Every image keeps different patches.

    After Liang et al. 2022, 2202.07800.
    """

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
    return models.randomised(Pruning(*args, **options))


images_of = functools.partial(models.pictures, (32, 48))


def on_cells(values, picked):
    """Place one value per picked token on a 4 × 6 grid."""
    grid = torch.zeros(len(values), 24)
    for b in range(len(values)):
        for index, cell in enumerate(picked[b].tolist()):
            grid[b, cell] = values[b, index]
    return grid.reshape(-1, 4, 6)


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("rest", [False, True], ids=["dropped", "mean token"])
def test_remaining_tokens_keep_their_positions_in_every_image(pick, rest):
    model = pruning(PICKS[pick], rest=rest)
    for seed in (1, 2):  # the second batch has other positions than the first
        images = images_of(batch=3, seed=seed)
        # with `rest`, the softmax of the scores is recorded between the two layers
        first, *_, last = kept(model, images, FullAttention())
        picked = model.prune.picked
        assert len({tuple(cells) for cells in picked.sort().values.tolist()}) == 3
        assert (first.grid, last.grid) == ((4, 6), (4, 6))
        assert (first.num_prefix_tokens, last.num_prefix_tokens) == (1, 1)
        expected = [[-1, *cells, *([-1] if rest else [])] for cells in picked.tolist()]
        assert last.keys.images(3)[:, 0].tolist() == expected
        assert last.queries.images(3)[:, 0].tolist() == expected
        assert first.keys.in_order
        weights = softmax_by_hand(*model.last.query_and_key)
        close(last.weights[:, 0].double(), weights, atol=1e-5, rtol=0)
        maps = RawAttention()(model, images)
        close(maps.raw.double(), on_cells(weights.mean(1)[:, 0, 1 : 1 + KEEP], picked).double(), atol=1e-5, rtol=0)


def test_tokens_that_remain_after_two_reductions_keep_their_positions():
    class Twice(Pruning):
        def __init__(self):
            super().__init__()
            self.prune2, self.third = Prune(functools.partial(gather, keep=3), True, False), Attention()

        def forward(self, images):
            x = self.last(self.prune(self.first(self.tokens(images))))
            return self.third(self.prune2(x))

    torch.manual_seed(0)
    model = models.randomised(Twice())
    third = kept(model, images_of(batch=3), ClassRow())[-1]
    assert (third.name, third.grid) == ("third", (4, 6))
    assert third.keys.images(3)[:, 0, 1:].tolist() == model.prune.picked.gather(1, model.prune2.picked).tolist()


def merge(x, scores):
    """Merge tokens with even indices into the most similar tokens with odd indices (Bolya et al. 2023, 2210.09461)."""
    source, target = x[:, ::2], x[:, 1::2]
    similarity, most_similar = (F.normalize(source, dim=2) @ F.normalize(target, dim=2).mT).max(2)
    order = similarity.argsort(descending=True)
    merged, left = order[:, :KEEP], order[:, KEEP:]
    into, away, stay = (which[..., None].expand(-1, -1, 16) for which in (most_similar.gather(1, merged), merged, left))
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


def test_the_grid_has_all_rows_and_columns_even_if_all_their_tokens_are_dropped():
    model = pruning()
    with torch.no_grad():  # the score of a patch is its brightness
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


@pytest.mark.parametrize("rest", [False, True], ids=["dropped", "mean token"])
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
        if name not in ("rollout", "grad_rollout", "chefer"):  # these also use the first layer, which has all tokens
            dropped = torch.ones(24, dtype=torch.bool)
            dropped[cells] = False
            assert not raw.flatten()[dropped].any()


def test_rollout_gives_dropped_tokens_their_relevance_in_the_first_layer():
    model, images = pruning(), images_of(batch=3)
    first, last = (record.weights[:, 0] for record in kept(model, images, HeadMean()))
    expected = torch.zeros(3, 24)
    for b, cells in enumerate(model.prune.picked.tolist()):
        tokens = [0, *(cell + 1 for cell in cells)]
        row = torch.zeros(25)
        row[0] = 0.5
        for index, token in enumerate(tokens):
            row[token] += 0.5 * last[b, 0, index]
        expected[b] = (0.5 * row + 0.5 * row @ first[b])[1:]
    close(Rollout()(model, images).raw.flatten(1), expected, atol=1e-5, rtol=0)


def test_without_a_class_token_rollout_starts_on_the_remaining_tokens():
    model, images = pruning(class_token=False), images_of(batch=3)
    first, last = (record.weights[:, 0] for record in kept(model, images, HeadMean()))
    expected = torch.zeros(3, 24)
    for b, cells in enumerate(model.prune.picked.tolist()):
        row = torch.zeros(24)
        for index, cell in enumerate(cells):
            row[cell] = 0.5 / KEEP + 0.5 * last[b, :, index].mean()
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
    model, images = models.randomised(Fixed()), images_of(batch=2)
    runs = []
    run_survey = survey_module._run_survey
    monkeypatch.setattr(survey_module, "_run_survey", lambda *args: runs.append(1) or run_survey(*args))
    for _ in range(3):
        _, last = kept(model, images, ClassRow())
    assert len(runs) == 1
    assert last.grid == (4, 6)
    assert last.keys.index_WN.tolist() == [[-1, 5, 0, 7, 22, 23, 11]]


def test_a_call_whose_layout_differs_between_images_is_reported():
    class PruneBrightImages(Pruning):
        """Attend over all tokens of a dark image, and over six tokens of a bright image."""

        def forward(self, images):
            x = self.embed(images).flatten(2).mT
            pruned = self.prune(x)
            if images.mean() > 0:
                return self.head(self.last(pruned).mean(1))
            return self.head(self.last(x).mean(1))

    torch.manual_seed(0)
    model = models.randomised(PruneBrightImages(class_token=False))
    images = images_of(batch=2)
    images[0] += 9
    message = "last: its attention differs between the images of a batch"
    with pytest.raises(UsageError, match=message), torch.no_grad(), capture(model):
        model(images)


def test_a_function_through_which_positions_cannot_be_followed_gives_a_warning():
    x = torch.zeros(1, 2, 2)
    token_positions.cast(x, torch.zeros(1, 2, 2, dtype=torch.complex64))

    def view(value):
        raise RuntimeError("no complex form")

    with pytest.warns(MapWarning, match=r"could not be followed through view \(no complex form\)"):
        token_positions.follow(view, (x,), {}, torch.zeros(4))
