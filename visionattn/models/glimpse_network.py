"""The recurrent attention model: it looks at an image through a sequence of glimpses.

Shapes: B images, R rollouts of each, N = B·R, T glimpses, t choices of a location, D features of the state, K classes,
S scales, C channels, H × W image, h × w patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from visionattn.attention.hard.policies import Choice, Policy
from visionattn.attention.hard.retina import Retina, View
from visionattn.errors import UsageError
from visionattn.models.encoders import Encoder

Look = Literal["sample", "mean", "random", "centre"]


class Answer(NamedTuple):
    """`logits` (B, K), and after how many glimpses (B,) they were given."""

    logits: Tensor
    glimpses: Tensor


class Memory(NamedTuple):
    """State of the core, (N, D) each; `cell` is that of an LSTM and elsewhere unused."""

    hidden: Tensor
    cell: Tensor


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
        batch = len(x_BCHW)
        view = self.retina.view(x_BCHW)
        memory, choice = self._start(x_BCHW, rollouts, look)
        choices, asked, locations, states = [], [], [], []
        if choice is not None:
            choices.append(choice)
            asked.append(memory.hidden.detach())
        location_N2 = self._first(choice, memory, look)
        for turn in range(num_glimpses or self.num_glimpses):
            if turn:
                asked.append(memory.hidden.detach())
                choices.append(self.policy(asked[-1], greedy=look == "mean"))
                location_N2 = _controlled(choices[-1].location, look)
            memory = self._see(view, location_N2, memory)
            locations.append(location_N2)
            states.append(memory.hidden)

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

    @torch.no_grad()
    def answer(self, x_BCHW: Tensor, *, confidence: float, num_glimpses: int | None = None) -> Answer:
        """Look at each image, by the mean policy, until the likeliest class has this probability (Wang et al. 2020,
        2010.05300, section 3.3); images that are done cost nothing more.

        Args:
            x_BCHW: images.
            confidence: in [0, 1]; above 1, every image gets all glimpses.
            num_glimpses: the most glimpses of an image.
        """
        most = num_glimpses or self.num_glimpses
        view = self.retina.view(x_BCHW)
        memory, choice = self._start(x_BCHW, 1, "mean")
        location_N2 = self._first(choice, memory, "mean")
        logits_BK = x_BCHW.new_zeros(len(x_BCHW), self.num_classes)
        glimpses_B = torch.full((len(x_BCHW),), most, device=x_BCHW.device)
        open_N = torch.arange(len(x_BCHW), device=x_BCHW.device)
        for turn in range(1, most + 1):
            memory = self._see(view, location_N2, memory)
            logits_NK = self.head(memory.hidden)
            logits_BK[open_N] = logits_NK
            goes_on_N = logits_NK.softmax(-1).amax(-1) < confidence
            glimpses_B[open_N[~goes_on_N]] = turn
            open_N = open_N[goes_on_N]
            if turn == most or not len(open_N):
                break
            memory = Memory(*(part[goes_on_N] for part in memory))
            view = view.of(goes_on_N)
            location_N2 = self.policy(memory.hidden, greedy=True).location
        return Answer(logits_BK, glimpses_B)

    def _start(self, x_BCHW: Tensor, rollouts: int, look: Look) -> tuple[Memory, Choice | None]:
        """What is known before the first glimpse, and where to look first if that is chosen."""
        nothing_ND = x_BCHW.new_zeros(len(x_BCHW) * rollouts, self.hidden_size)
        if self.glance is None or self.begin is None:
            return Memory(nothing_ND, nothing_ND), None
        hidden_ND = self.begin(self.glance(x_BCHW)).tanh().repeat_interleave(rollouts, 0)
        return Memory(hidden_ND, nothing_ND), self.policy(hidden_ND.detach(), greedy=look == "mean")

    def _first(self, choice: Choice | None, memory: Memory, look: Look) -> Tensor:
        if choice is not None:
            return _controlled(choice.location, look)
        location_N2 = memory.hidden.new_zeros(len(memory.hidden), 2)
        drawn = look == "random" or (look == "sample" and self.start == "random")
        return location_N2.uniform_(-1, 1) if drawn else location_N2

    def _see(self, view: View, location_N2: Tensor, memory: Memory) -> Memory:
        batch = len(view.planes[0])
        patch_BRSChw = self.retina.look(view, location_N2.unflatten(0, (batch, -1)))
        what_NG = self.what(self.encoder(patch_BRSChw.flatten(0, 1).flatten(1, 2)))
        glimpse_NG = (what_NG + self.where(location_N2)).relu()
        if isinstance(self.core, nn.LSTMCell):
            return Memory(*self.core(glimpse_NG, tuple(memory)))
        return Memory(self.core(glimpse_NG, memory.hidden), memory.cell)


def _controlled(location_N2: Tensor, look: Look) -> Tensor:
    """The location, or what a control puts in its place."""
    if look == "random":
        return torch.empty_like(location_N2).uniform_(-1, 1)
    return torch.zeros_like(location_N2) if look == "centre" else location_N2
