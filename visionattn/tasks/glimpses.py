"""Classification by glimpses: cross-entropy for what is seen, REINFORCE for where to look.

Shapes: B batch, C channels, H rows, W columns, K classes, R rollouts, T glimpses, t choices of a location.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.models.glimpse_network import GlimpseNetwork, Look, Rollout
from visionattn.tasks import reinforce
from visionattn.tasks.base import NamingTask

Reward = Literal["correct", "log_likelihood", "confidence_gain"]
Baseline = Literal["none", "moving_average", "batch_mean", "learned", "self_critical", "leave_one_out"]

_REWARDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "correct": reinforce.correct,
    "log_likelihood": reinforce.log_likelihood,
    "confidence_gain": reinforce.confidence_gain,
}
_CORNER = 0.8
_KEPT = 0.99  # of the moving average, a step
_AVERAGED = 10  # rollouts whose probabilities are averaged, as public results are


class GlimpseClassification(NamingTask):
    """Train a glimpse network to name what an image shows (Mnih et al. 2014, 1406.6247).

        loss = NLL + reinforce_weight · (− Σ_t log π(l_t) · (G_t − b_t)) + (b_t − G_t)²  [learned] − entropy_weight · H

    The NLL does not reach the policy, and the policy's loss reaches nothing else; a learned baseline gets its own loss
    only. With a `pathwise` policy there is no REINFORCE term: the gradient comes through the location.

    Logged while training: `train/loss`, `reward`, and of the policy `entropy` (nats, a choice), `clipped` (share of
    actions outside the image), `corners` (share of locations with |x| and |y| > 0.8), `gradient_variance` and
    `gradient_snr` (of the policy's outputs; see `reinforce.gradient_noise`).

    Validation and test score the mean policy. The test also scores sampled locations, once (`accuracy_sampled`) and
    with the probabilities of 10 rollouts averaged (`accuracy_sampled_10`), two controls, random locations and the
    centre only (`accuracy_random`, `accuracy_centre`), and the mean policy after each glimpse (`accuracy_after_1` …).
    Where the data knows the objects' boxes, `fixations_on_object` is the share of the locations that the mean policy
    chose that lie in them, and `fixations_random` that of random ones.

    Args:
        network: a glimpse network.
        rollouts: R, of every image in training.
        reward: what a rollout earns; see `reinforce`.
        baseline: what is subtracted from it: the mean over the `batch_mean`'s other rollouts, the mean over the same
            image's others (`leave_one_out`, needs rollouts ≥ 2), a `moving_average` over steps, a linear map of the
            state (`learned`), the reward of the mean policy (`self_critical`), or nothing.
        reinforce_weight: of the policy's loss.
        entropy_weight: of a bonus for entropy.
        every_glimpse: share of the NLL that is its mean over all glimpses rather than that of the last, in [0, 1]; with
            it the network may be stopped early.
        optimization: `label_smoothing`, `optimizer`, `lr_scheduler`, `lr_interval` and `gamma_lr_factor`, as
            `NamingTask` and `Task`.
    """

    network: GlimpseNetwork
    average: Tensor

    def __init__(
        self,
        network: GlimpseNetwork,
        *,
        rollouts: int = 2,
        reward: Reward = "correct",
        baseline: Baseline = "leave_one_out",
        reinforce_weight: float = 1.0,
        entropy_weight: float = 0.0,
        every_glimpse: float = 0.0,
        **optimization: Any,
    ) -> None:
        super().__init__(network, **optimization)
        if rollouts < 1 or (baseline == "leave_one_out" and rollouts < 2):
            raise ValueError(f"rollouts must be ≥ 1, and ≥ 2 with the baseline leave_one_out, got {rollouts}")
        if not 0 <= every_glimpse <= 1:
            raise ValueError(f"every_glimpse must be in [0, 1], got {every_glimpse}")
        self.rollouts = rollouts
        self.reward = reward
        self.baseline = baseline
        self.reinforce_weight = reinforce_weight
        self.entropy_weight = entropy_weight
        self.every_glimpse = every_glimpse
        self.value = nn.Linear(network.hidden_size, 1) if baseline == "learned" else None
        self.register_buffer("average", torch.zeros(()))

    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_BK, labels, label_smoothing=self.label_smoothing)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        steps = max(1, int(self.trainer.estimated_stepping_batches) - 1)
        self.network.policy.progress(min(1.0, self.global_step / steps))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images_BCHW, label_B = batch["image"], batch["label"]
        rollout = self.network.rollout(images_BCHW, rollouts=self.rollouts)
        loss = self._seen(rollout, label_B)
        logged = {"train/loss": loss.detach()}
        if rollout.log_prob.shape[-1] and not self.network.policy.pathwise:
            policy_loss, value_loss, logged["train/reward"] = self.policy_terms(batch, rollout)
            if self._logs_now():
                logged |= self._noise(policy_loss, rollout)
            loss = loss + self.reinforce_weight * policy_loss + value_loss
        if self.entropy_weight:
            loss = loss - self.entropy_weight * rollout.entropy.sum(-1).mean()
        if self._logs_now():
            logged |= self._habits(rollout)
        self.log_dict(logged, batch_size=len(label_B))
        return loss

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images_BCHW, label_B = batch["image"], batch["label"]
        mean = self.network.rollout(images_BCHW, look="mean")
        logits_BTK = mean.logits[:, 0]
        looks: tuple[tuple[str, Look, int], ...] = (
            ("sampled", "sample", 1),
            (f"sampled_{_AVERAGED}", "sample", _AVERAGED),
            ("random", "random", 1),
            ("centre", "centre", 1),
        )
        answers = {f"after_{turn + 1}": logits_BTK[:, turn] for turn in range(logits_BTK.shape[1])}
        for name, look, rollouts in looks:
            rollout = self.network.rollout(images_BCHW, look=look, rollouts=rollouts)
            answers[name] = rollout.logits[:, :, -1].softmax(-1).mean(1)
            if look == "random" and "box" in batch and rollout.log_prob.shape[-1]:
                for figure, one in (("on_object", mean), ("random", rollout)):
                    share = on_object(one, batch["box"], (images_BCHW.shape[-2], images_BCHW.shape[-1])).mean()
                    self.log(f"test/fixations_{figure}", share, batch_size=len(label_B), on_epoch=True, sync_dist=True)
        for name, answer_BK in answers.items():
            self.tally(f"test/accuracy_{name}", (answer_BK.argmax(-1) == label_B).float())
        return super().test_step(batch, batch_idx)

    def policy_terms(self, batch: dict[str, Any], rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's loss, that of a learned baseline, and the mean reward, of a rollout of a batch."""
        returns_BRt = _REWARDS[self.reward](rollout.logits.detach(), batch["label"], rollout.log_prob.shape[-1])
        baseline_BRt, value_loss = self._baseline(batch, rollout, returns_BRt)
        return reinforce.policy_loss(rollout.log_prob, returns_BRt - baseline_BRt), value_loss, returns_BRt.mean()

    def _seen(self, rollout: Rollout, label_B: Tensor) -> Tensor:
        logits_BRTK = rollout.logits
        batch, rollouts, glimpses, _ = logits_BRTK.shape
        label_BRT = label_B[:, None, None].expand(batch, rollouts, glimpses)
        last = self.loss(logits_BRTK[:, :, -1].flatten(0, 1), label_BRT[:, :, -1].flatten())
        if not self.every_glimpse:
            return last
        return torch.lerp(last, self.loss(logits_BRTK.flatten(0, 2), label_BRT.flatten()), self.every_glimpse)

    def _baseline(self, batch: dict[str, Any], rollout: Rollout, returns_BRt: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted from the returns, and the loss of what is learned for it."""
        nothing = returns_BRt.new_zeros(())
        match self.baseline:
            case "none":
                return torch.zeros_like(returns_BRt), nothing
            case "batch_mean":
                return reinforce.batch_mean(returns_BRt), nothing
            case "leave_one_out":
                return reinforce.leave_one_out(returns_BRt), nothing
            case "moving_average":
                before = self.average.clone()  # of earlier steps only, so that it does not depend on this one
                self.average.lerp_(returns_BRt.mean(), 1 - _KEPT)
                return before.expand_as(returns_BRt), nothing
            case "self_critical":
                with torch.no_grad():
                    logits_BRTK = self.network.rollout(batch["image"], look="mean").logits
                earned_B1t = _REWARDS[self.reward](logits_BRTK, batch["label"], returns_BRt.shape[-1])
                return earned_B1t.expand_as(returns_BRt), nothing
            case "learned":
                assert self.value is not None
                value_BRt = self.value(rollout.state).squeeze(-1)
                return value_BRt.detach(), F.mse_loss(value_BRt, returns_BRt)

    def _logs_now(self) -> bool:
        return self.trainer.fast_dev_run or self.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _noise(self, policy_loss: Tensor, rollout: Rollout) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(policy_loss, rollout.parameters, retain_graph=True)
        # the loss is a mean over rollouts, and each one's parameters take part in its own term only
        variance, ratio = reinforce.gradient_noise(torch.cat(gradients, 1) * len(gradients[0]))
        return {"train/gradient_variance": variance, "train/gradient_snr": ratio}

    def _habits(self, rollout: Rollout) -> dict[str, Tensor]:
        if not rollout.log_prob.shape[-1]:
            return {}
        chosen = rollout.location[:, :, -rollout.log_prob.shape[-1] :]
        return {
            "train/entropy": rollout.entropy.mean().detach(),
            "train/clipped": rollout.clipped.float().mean(),
            "train/corners": (chosen.abs() > _CORNER).all(-1).float().mean(),
        }


def on_object(rollout: Rollout, box_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Share of the locations that were chosen (B,) that lie in each image's box, xyxy in pixels of images (H, W)."""
    chosen_BRt2 = rollout.location[:, :, -rollout.log_prob.shape[-1] :]
    # −1 and 1 are the centres of the outermost pixels, and pixel 0 begins at 0
    sides_2 = chosen_BRt2.new_tensor([size[1], size[0]])
    place_BRt2 = (chosen_BRt2 + 1) / 2 * (sides_2 - 1) + 0.5
    low_B112, high_B112 = box_B4[:, None, None, :2], box_B4[:, None, None, 2:]
    return ((place_BRt2 >= low_B112) & (place_BRt2 <= high_B112)).all(-1).float().mean((1, 2))
