"""The recurrent attention model: it looks at an image through a sequence of glimpses.

Shapes: B images, R rollouts of each, N = B·R, T glimpses, t choices of a location, D features of the state, K classes,
S scales, C channels, H × W image, h × w patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from visionattn.attention.glimpse import Retina
from visionattn.attention.policies import Policy
from visionattn.errors import UsageError
from visionattn.models.encoders import Encoder

Look = Literal["sample", "mean", "random", "centre"]


@dataclass(frozen=True)
class Rollout:
    """What a glimpse network did with a batch.

    Attributes:
        location: (B, R, T, 2), where it looked, (x, y) in [−1, 1].
        logits: (B, R, T, K), its belief after each glimpse.
        state: (B, R, t, D), what each choice of a location was made from, without gradient.
        log_prob: (B, R, t) of those choices. The first location is nobody's choice (t = T − 1) unless there is a
            glance (t = T); no location is chosen that is not looked at.
        entropy: (B, R, t), nats.
        clipped: (B, R, t), whether the action lay outside the image.
        parameters: of each choice, (N, P), those of its distribution, through which alone the policy learns.
    """

    location: Tensor
    logits: Tensor
    state: Tensor
    log_prob: Tensor
    entropy: Tensor
    clipped: Tensor
    parameters: tuple[Tensor, ...]


class GlimpseNetwork(nn.Module):
    """Recurrent models of visual attention (Mnih et al. 2014, 1406.6247).

        g_i = relu(what(patches_i) + where(l_i)),   h_i = core(h_{i−1}, g_i),   l_{i+1} ~ policy(h_i)

    with what = Linear(encoder(patches)) and where = Linear(relu(Linear(l))). Logits are a linear map of h_i after every
    glimpse. With a glance (the context network of Ba et al. 2015, 1412.7755, or the first step of Wang et al. 2020,
    2010.05300), h_0 is a map of it and the first location is chosen as well.

    Deviations from the paper: the policy sees the state without passing a gradient to it, so that what the core keeps
    is decided by the classification alone; the first location is the image's centre unless `start` is random.

    Args:
        num_classes: K.
        retina: what a glimpse sees.
        policy: makes the policy from D.
        encoder: makes what turns patches (N, S·C, h, w) into features (N, out_features), from (S·C, (h, w)).
        core: makes the recurrent cell from (features of a glimpse, D): torch.nn.LSTMCell, GRUCell or RNNCell.
        num_glimpses: T.
        hidden_size: D.
        glimpse_features: of a glimpse.
        where_features: of a location, before it joins the patches.
        start: the first location, where there is no glance; `random` is uniform, and the centre under the mean policy.
        glance: makes what turns the whole image into features (B, out_features), from C; see `Glance`.
        dropout: of the states that the logits are made from.
        in_chans: C.

    Shape: (B, C, H, W) → logits (B, K) after the last glimpse, under the mean policy.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        retina: Retina,
        policy: Callable[[int], Policy],
        encoder: Callable[[int, tuple[int, int]], Encoder],
        core: Callable[[int, int], nn.RNNCellBase] = nn.LSTMCell,
        num_glimpses: int = 6,
        hidden_size: int = 256,
        glimpse_features: int = 256,
        where_features: int = 128,
        start: Literal["centre", "random"] = "centre",
        glance: Callable[[int], Encoder] | None = None,
        dropout: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if num_glimpses < 1:
            raise ValueError(f"num_glimpses must be ≥ 1, got {num_glimpses}")
        if start not in ("centre", "random"):
            raise ValueError(f"start must be centre or random, got {start!r}")
        self.num_classes = num_classes
        self.num_glimpses = num_glimpses
        self.hidden_size = hidden_size
        self.start = start
        self.retina = retina
        self.encoder = encoder(retina.scales * in_chans, retina.patch_size)
        self.what = nn.Linear(self.encoder.out_features, glimpse_features)
        self.where = nn.Sequential(nn.Linear(2, where_features), nn.ReLU(), nn.Linear(where_features, glimpse_features))
        self.core = core(glimpse_features, hidden_size)
        self.policy = policy(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, num_classes)
        self.glance = glance(in_chans) if glance else None
        self.begin = nn.Linear(self.glance.out_features, hidden_size) if self.glance else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.rollout(x_BCHW, look="mean").logits[:, 0, -1]

    def rollout(
        self, x_BCHW: Tensor, *, rollouts: int = 1, look: Look = "sample", num_glimpses: int | None = None
    ) -> Rollout:
        """Look at every image `rollouts` times over.

        Args:
            x_BCHW: images.
            rollouts: R.
            look: `sample` draws locations from the policy, `mean` takes its most likely ones; `random` (uniform) and
                `centre` are controls that take no notice of it.
            num_glimpses: T, another than in training.
        """
        if look not in ("sample", "mean", "random", "centre"):
            raise UsageError(f"look must be sample, mean, random or centre, got {look!r}")
        batch, number = len(x_BCHW), num_glimpses or self.num_glimpses
        view = self.retina.view(x_BCHW)
        hidden_ND = x_BCHW.new_zeros(batch * rollouts, self.hidden_size)
        memory_ND = hidden_ND
        location_N2 = x_BCHW.new_zeros(batch * rollouts, 2)
        choices, asked, locations, states = [], [], [], []
        if self.glance is not None and self.begin is not None:
            hidden_ND = self.begin(self.glance(x_BCHW)).tanh().repeat_interleave(rollouts, 0)
        elif look == "random" or (look == "sample" and self.start == "random"):
            location_N2 = location_N2.uniform_(-1, 1)
        for turn in range(number):
            if turn or self.glance is not None:
                asked.append(hidden_ND.detach())
                choices.append(self.policy(asked[-1], greedy=look == "mean"))
                location_N2 = choices[-1].location
                if look == "random":
                    location_N2 = torch.empty_like(location_N2).uniform_(-1, 1)
                elif look == "centre":
                    location_N2 = torch.zeros_like(location_N2)
            patch_BRSChw = self.retina.look(view, location_N2.unflatten(0, (batch, rollouts)))
            what_NG = self.what(self.encoder(patch_BRSChw.flatten(0, 1).flatten(1, 2)))
            glimpse_NG = (what_NG + self.where(location_N2)).relu()
            if isinstance(self.core, nn.LSTMCell):
                hidden_ND, memory_ND = self.core(glimpse_NG, (hidden_ND, memory_ND))
            else:
                hidden_ND = self.core(glimpse_NG, hidden_ND)
            locations.append(location_N2)
            states.append(hidden_ND)

        def apart(steps: list[Tensor], *shape: int) -> Tensor:
            if not steps:
                return x_BCHW.new_zeros(batch, rollouts, 0, *shape)
            return torch.stack(steps, 1).unflatten(0, (batch, rollouts))

        return Rollout(
            location=apart(locations),
            logits=self.head(self.dropout(apart(states))),
            state=apart(asked, self.hidden_size),
            log_prob=apart([choice.log_prob for choice in choices]),
            entropy=apart([choice.entropy for choice in choices]),
            clipped=apart([choice.clipped for choice in choices]),
            parameters=tuple(choice.parameters for choice in choices),
        )
