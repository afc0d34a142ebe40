"""The recurrent attention model, which classifies an image from a sequence of glimpses.

Shapes: B images, R rollouts per image, N = B·R, T glimpses, t chosen locations, D features of the state, K classes,
S scales, C channels, H × W image, h × w patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from visionattn.attention import Choice, Policy, Retina, View
from visionattn.errors import UsageError
from visionattn.models.encoders import Encoder

LocationMode = Literal["sample", "mean", "random", "centre"]


class Answer(NamedTuple):
    """`logits` (B, K), and the number of glimpses (B,) that were used for them."""

    logits: Tensor
    glimpses: Tensor


class Memory(NamedTuple):
    """State of the core, (N, D) each; `cell` is the cell state of an LSTM, and unused by other cores."""

    hidden: Tensor
    cell: Tensor


@dataclass(frozen=True)
class Rollout:
    """The locations and predictions of a glimpse network for a batch.

    Attributes:
        location: (B, R, T, 2), the locations of the glimpses, (x, y) in [−1, 1].
        logits: (B, R, T, K), the prediction after each glimpse.
        state: (B, R, t, D), the input of the policy for each choice, without gradient.
        log_prob: (B, R, t), log-probabilities of the choices. With a glance, the policy chooses every location (t = T);
            without a glance, every location except the first (t = T − 1).
        entropy: (B, R, t), nats.
        clipped: (B, R, t), whether the action lay outside the image.
        parameters: for each choice, the P parameters of its distribution, (N, P); the policy gets its gradients only
            through these.
    """

    location: Tensor
    logits: Tensor
    state: Tensor
    log_prob: Tensor
    entropy: Tensor
    clipped: Tensor
    parameters: tuple[Tensor, ...]


class GlimpseNetwork(nn.Module):
    """A recurrent model of visual attention (Mnih et al. 2014, 1406.6247).

        g_i = relu(what(patches_i) + where(l_i)),   h_i = core(h_{i−1}, g_i),   l_{i+1} ~ policy(h_i)

    `what` is Linear(encoder(patches)), and `where` is Linear(relu(Linear(l))). After every glimpse the logits are a
    linear map of h_i. With a glance (the context network of Ba et al. 2015, 1412.7755, or the first step of Wang et al.
    2020, 2010.05300), h_0 is computed from the whole image, and the policy also chooses the first location.

    Deviations from the paper: no gradient flows from the policy to the state, so that the core is trained by the
    classification alone; the first location is the image's centre unless `start` is random.

    Args:
        num_classes: K.
        retina: reads the patches of a glimpse.
        policy: function that makes the policy from D.
        encoder: function that makes the encoder from (S·C, (h, w)); the encoder turns patches (N, S·C, h, w) into
            features (N, out_features).
        core: function that makes the recurrent cell from (glimpse_features, D): torch.nn.LSTMCell (default), GRUCell or
            RNNCell.
        num_glimpses: T (default: 6).
        hidden_size: D (default: 256).
        glimpse_features: size of g (default: 256).
        where_features: size of the hidden layer of `where` (default: 128).
        start: the first location without a glance (default: centre); `random` draws it uniformly, but the mean policy
            still starts at the centre.
        glance: function that makes a module from C; the module turns the whole image into features (B, out_features),
            see `Glance` (default: no glance).
        dropout: dropout probability of the states before the logits (default: 0).
        in_chans: C (default: 3).

    Raises:
        ValueError: num_glimpses or start is out of its range.

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
        return self.rollout(x_BCHW, locations="mean").logits[:, 0, -1]

    def rollout(
        self, x_BCHW: Tensor, *, rollouts: int = 1, locations: LocationMode = "sample", num_glimpses: int | None = None
    ) -> Rollout:
        """Run `rollouts` sequences of glimpses on every image.

        Args:
            x_BCHW: images.
            rollouts: R (default: 1).
            locations: `sample` draws locations from the policy (default), `mean` takes the most likely locations;
                `random` (uniform) and `centre` are controls that ignore the policy.
            num_glimpses: T (default: the network's `num_glimpses`).

        Raises:
            UsageError: `locations` has another value.
        """
        if locations not in ("sample", "mean", "random", "centre"):
            raise UsageError(f"locations must be sample, mean, random or centre, got {locations!r}")
        batch = len(x_BCHW)
        view = self.retina.view(x_BCHW)
        memory, choice = self._start(x_BCHW, rollouts, locations)
        choices, policy_inputs, visited, states = [], [], [], []
        if choice is not None:
            choices.append(choice)
            policy_inputs.append(memory.hidden.detach())
        location_N2 = self._first(choice, memory, locations)
        for turn in range(num_glimpses or self.num_glimpses):
            if turn:
                policy_inputs.append(memory.hidden.detach())
                choices.append(self.policy(policy_inputs[-1], greedy=locations == "mean"))
                location_N2 = _controlled(choices[-1].location, locations)
            memory = self._glimpse(view, location_N2, memory)
            visited.append(location_N2)
            states.append(memory.hidden)

        def by_rollout(steps: list[Tensor], *shape: int) -> Tensor:
            if not steps:
                return x_BCHW.new_zeros(batch, rollouts, 0, *shape)
            return torch.stack(steps, 1).unflatten(0, (batch, rollouts))

        return Rollout(
            location=by_rollout(visited),
            logits=self.head(self.dropout(by_rollout(states))),
            state=by_rollout(policy_inputs, self.hidden_size),
            log_prob=by_rollout([choice.log_prob for choice in choices]),
            entropy=by_rollout([choice.entropy for choice in choices]),
            clipped=by_rollout([choice.clipped for choice in choices]),
            parameters=tuple(choice.parameters for choice in choices),
        )

    @torch.no_grad()
    def answer(self, x_BCHW: Tensor, *, confidence: float, num_glimpses: int | None = None) -> Answer:
        """Classify each image with the mean policy, and stop when the top class reaches a probability.

        As in Wang et al. 2020, 2010.05300, section 3.3. Images that have stopped cost no further computation.

        Args:
            x_BCHW: images.
            confidence: the probability, in [0, 1]; above 1, every image gets all glimpses.
            num_glimpses: maximum of glimpses per image (default: the network's `num_glimpses`).
        """
        max_glimpses = num_glimpses or self.num_glimpses
        view = self.retina.view(x_BCHW)
        memory, choice = self._start(x_BCHW, 1, "mean")
        location_N2 = self._first(choice, memory, "mean")
        logits_BK = x_BCHW.new_zeros(len(x_BCHW), self.num_classes)
        glimpses_B = torch.full((len(x_BCHW),), max_glimpses, device=x_BCHW.device)
        open_N = torch.arange(len(x_BCHW), device=x_BCHW.device)
        for turn in range(1, max_glimpses + 1):
            memory = self._glimpse(view, location_N2, memory)
            logits_NK = self.head(memory.hidden)
            logits_BK[open_N] = logits_NK
            continue_N = logits_NK.softmax(-1).amax(-1) < confidence
            glimpses_B[open_N[~continue_N]] = turn
            open_N = open_N[continue_N]
            if turn == max_glimpses or not len(open_N):
                break
            memory = Memory(*(part[continue_N] for part in memory))
            view = view.of(continue_N)
            location_N2 = self.policy(memory.hidden, greedy=True).location
        return Answer(logits_BK, glimpses_B)

    def _start(self, x_BCHW: Tensor, rollouts: int, locations: LocationMode) -> tuple[Memory, Choice | None]:
        """Return the memory before the first glimpse, and the choice of the first location if there is a glance."""
        zeros_ND = x_BCHW.new_zeros(len(x_BCHW) * rollouts, self.hidden_size)
        if self.glance is None or self.begin is None:
            return Memory(zeros_ND, zeros_ND), None
        hidden_ND = self.begin(self.glance(x_BCHW)).tanh().repeat_interleave(rollouts, 0)
        return Memory(hidden_ND, zeros_ND), self.policy(hidden_ND.detach(), greedy=locations == "mean")

    def _first(self, choice: Choice | None, memory: Memory, locations: LocationMode) -> Tensor:
        if choice is not None:
            return _controlled(choice.location, locations)
        location_N2 = memory.hidden.new_zeros(len(memory.hidden), 2)
        drawn = locations == "random" or (locations == "sample" and self.start == "random")
        return location_N2.uniform_(-1, 1) if drawn else location_N2

    def _glimpse(self, view: View, location_N2: Tensor, memory: Memory) -> Memory:
        """Read the patches at a location, and update the memory."""
        batch = len(view.planes[0])
        rollouts = len(location_N2) // max(1, batch)  # a process without images gets an empty batch
        patch_BRSChw = self.retina.look(view, location_N2.unflatten(0, (batch, rollouts)))
        what_NG = self.what(self.encoder(patch_BRSChw.flatten(0, 1).flatten(1, 2)))
        glimpse_NG = (what_NG + self.where(location_N2)).relu()
        if isinstance(self.core, nn.LSTMCell):
            return Memory(*self.core(glimpse_NG, tuple(memory)))
        return Memory(self.core(glimpse_NG, memory.hidden), memory.cell)


def _controlled(location_N2: Tensor, locations: LocationMode) -> Tensor:
    """Return the policy's locations, or the locations of a control: random or central."""
    if locations == "random":
        return torch.empty_like(location_N2).uniform_(-1, 1)
    return torch.zeros_like(location_N2) if locations == "centre" else location_N2
