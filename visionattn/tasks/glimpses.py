"""Classification by glimpses: cross-entropy trains the classifier, REINFORCE trains the policy over locations.

Shapes: B batch, C channels, H rows, W columns, K classes, R rollouts, T glimpses, t choices of a location.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.data import Batch
from visionattn.errors import UsageError
from visionattn.models import GlimpseNetwork, LocationMode, Rollout
from visionattn.tasks import reinforce
from visionattn.tasks.base import ClassificationTask

Reward = Literal["correct", "log_likelihood", "confidence_gain"]
Baseline = Literal["none", "moving_average", "batch_mean", "learned", "self_critical", "leave_one_out"]

_REWARDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "correct": reinforce.correct,
    "log_likelihood": reinforce.log_likelihood,
    "confidence_gain": reinforce.confidence_gain,
}
_CORNER = 0.8  # |x| and |y| above which a location counts as a corner
_DECAY = 0.99  # weight of the previous value in the moving average, at each step
_AVERAGED = 10  # number of rollouts whose probabilities are averaged in the test


class GlimpseClassification(ClassificationTask):
    """Train a glimpse network to classify images (Mnih et al. 2014, 1406.6247).

        loss = NLL + reinforce_weight · (− Σ_t log π(l_t) · (G_t − b_t)) + (b_t − G_t)²  [learned] − entropy_weight · H

    H is the policy's entropy. The term (b_t − G_t)² exists only with a learned baseline, and trains only the baseline.
    The REINFORCE term trains only the policy, and the NLL does not train the policy. A `pathwise` policy is the
    exception: there is no REINFORCE term, and the gradient of the NLL reaches the policy through the location.

    In training, the task logs `train/loss` and `train/reward`, and for the policy `train/entropy` (nats per choice),
    `train/clipped` (fraction of actions outside the image), `train/corners` (fraction of locations with |x|
    and |y| > 0.8), and `train/gradient_variance` and `train/gradient_snr` (of the gradient at the policy's outputs; see
    `reinforce.gradient_noise`).

    Validation and test score the mean policy. The test also logs more accuracies:

    - `accuracy_sampled`: with locations sampled from the policy, one rollout.
    - `accuracy_sampled_10`: with the probabilities averaged over 10 such rollouts.
    - `accuracy_random`, `accuracy_centre`: of the two controls, random locations and the centre alone.
    - `accuracy_after_1` …: of the mean policy after each glimpse.

    If the data has boxes of the objects, `fixations_on_object` is the fraction of the mean policy's chosen locations
    inside the boxes, and `fixations_random` is this fraction for random locations.

    Args:
        network: a glimpse network.
        rollouts: R, rollouts per image in training (default: 2).
        reward: how a rollout is rewarded, see `reinforce` (default: correct).
        baseline: name of the value that is subtracted from the reward (default: leave_one_out). `batch_mean`: the mean
            over all other rollouts of the batch; `leave_one_out`: the mean over the other rollouts of the same image
            (needs rollouts ≥ 2); `moving_average`: an average over earlier steps; `learned`: a linear map of the state;
            `self_critical`: the reward of the mean policy; `none`: 0.
        reinforce_weight: factor of the policy's loss (default: 1).
        entropy_weight: factor of the entropy bonus (default: 0).
        every_glimpse: weight w in NLL = (1 − w) · (NLL after the last glimpse) + w · (mean NLL over all glimpses), in
            [0, 1] (default: 0). With w > 0, the network also learns to classify after fewer glimpses.
        optimization: `label_smoothing`, `optimizer`, `lr_scheduler`, `lr_interval` and `gamma_lr_factor`, see
            `ClassificationTask` and `Task`.

    Raises:
        ValueError: an argument is out of its range.
        UsageError: in `setup`, if the training uses precision 16-true.
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
        **optimization: Any,  # the options of ClassificationTask
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

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.precision == "16-true":
            raise UsageError(
                "a glimpse network cannot be trained with trainer.precision 16-true, in which its weights become NaN; "
                "set 32-true, 16-mixed, bf16-mixed or bf16-true"
            )
        super().setup(stage)

    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_BK, labels, label_smoothing=self.label_smoothing)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        steps = max(1, int(self.trainer.estimated_stepping_batches) - 1)
        self.network.policy.progress(min(1.0, self.global_step / steps))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images_BCHW, label_B = batch["image"], batch["label"]
        rollout = self.network.rollout(images_BCHW, rollouts=self.rollouts)
        loss = self._classification_loss(rollout, label_B)
        logged = {"train/loss": loss.detach()}
        if rollout.log_prob.shape[-1] and not self.network.policy.pathwise:
            policy_loss, value_loss, logged["train/reward"] = self.policy_terms(batch, rollout)
            if self._logs_now():
                logged |= self._gradient_noise(policy_loss, rollout)
            loss = loss + self.reinforce_weight * policy_loss + value_loss
        if self.entropy_weight:
            loss = loss - self.entropy_weight * rollout.entropy.sum(-1).mean()
        if self._logs_now():
            logged |= self._policy_statistics(rollout)
        self.log_dict(logged, batch_size=len(label_B))
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images_BCHW, label_B = batch["image"], batch["label"]
        mean = self.network.rollout(images_BCHW, locations="mean")
        logits_BTK = mean.logits[:, 0]
        modes: tuple[tuple[str, LocationMode, int], ...] = (
            ("sampled", "sample", 1),
            (f"sampled_{_AVERAGED}", "sample", _AVERAGED),
            ("random", "random", 1),
            ("centre", "centre", 1),
        )
        answers = {f"after_{turn + 1}": logits_BTK[:, turn] for turn in range(logits_BTK.shape[1])}
        for name, locations, rollouts in modes:
            rollout = self.network.rollout(images_BCHW, locations=locations, rollouts=rollouts)
            answers[name] = rollout.logits[:, :, -1].softmax(-1).mean(1)
            if locations == "random" and "box" in batch and rollout.log_prob.shape[-1]:
                for metric, located in (("on_object", mean), ("random", rollout)):
                    size = images_BCHW.shape[-2], images_BCHW.shape[-1]
                    self.tally(f"test/fixations_{metric}", on_object(located, batch["box"], size))
        for name, answer_BK in answers.items():
            self.tally(f"test/accuracy_{name}", (answer_BK.argmax(-1) == label_B).float())
        return super().test_step(batch, batch_idx)

    def policy_terms(self, batch: Batch, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy's loss, the loss of a learned baseline, and the mean reward, for a rollout of a batch."""
        returns_BRt = _REWARDS[self.reward](rollout.logits.detach(), batch["label"], rollout.log_prob.shape[-1])
        baseline_BRt, value_loss = self._baseline(batch, rollout, returns_BRt)
        return reinforce.policy_loss(rollout.log_prob, returns_BRt - baseline_BRt), value_loss, returns_BRt.mean()

    def _classification_loss(self, rollout: Rollout, label_B: Tensor) -> Tensor:
        logits_BRTK = rollout.logits
        batch, rollouts, glimpses, _ = logits_BRTK.shape
        label_BRT = label_B[:, None, None].expand(batch, rollouts, glimpses)
        last = self.loss(logits_BRTK[:, :, -1].flatten(0, 1), label_BRT[:, :, -1].flatten())
        if not self.every_glimpse:
            return last
        return torch.lerp(last, self.loss(logits_BRTK.flatten(0, 2), label_BRT.flatten()), self.every_glimpse)

    def _baseline(self, batch: Batch, rollout: Rollout, returns_BRt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the baseline to subtract from the returns, and the loss that trains a learned baseline."""
        no_loss = returns_BRt.new_zeros(())
        match self.baseline:
            case "none":
                return torch.zeros_like(returns_BRt), no_loss
            case "batch_mean":
                return reinforce.batch_mean(returns_BRt), no_loss
            case "leave_one_out":
                return reinforce.leave_one_out(returns_BRt), no_loss
            case "moving_average":
                before = self.average.clone()  # of earlier steps only: the baseline must not depend on this step
                self.average.lerp_(returns_BRt.mean(), 1 - _DECAY)
                return before.expand_as(returns_BRt), no_loss
            case "self_critical":
                with torch.no_grad():
                    logits_BRTK = self.network.rollout(batch["image"], locations="mean").logits
                earned_B1t = _REWARDS[self.reward](logits_BRTK, batch["label"], returns_BRt.shape[-1])
                return earned_B1t.expand_as(returns_BRt), no_loss
            case "learned":
                assert self.value is not None
                value_BRt = self.value(rollout.state).squeeze(-1)
                return value_BRt.detach(), F.mse_loss(value_BRt, returns_BRt)

    def _logs_now(self) -> bool:
        trainer: Any = self.trainer  # Lightning's stubs lack both attributes
        return bool(trainer.fast_dev_run) or self.global_step % trainer.log_every_n_steps == 0

    def _gradient_noise(self, policy_loss: Tensor, rollout: Rollout) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(policy_loss, rollout.parameters, retain_graph=True)
        # the loss is a mean over rollouts, and the policy's outputs in a rollout affect only one term of this mean
        variance, ratio = reinforce.gradient_noise(torch.cat(gradients, 1) * len(gradients[0]))
        return {"train/gradient_variance": variance, "train/gradient_snr": ratio}

    def _policy_statistics(self, rollout: Rollout) -> dict[str, Tensor]:
        if not rollout.log_prob.shape[-1]:
            return {}
        chosen = rollout.location[:, :, -rollout.log_prob.shape[-1] :]
        return {
            "train/entropy": rollout.entropy.mean().detach(),
            "train/clipped": rollout.clipped.float().mean(),
            "train/corners": (chosen.abs() > _CORNER).all(-1).float().mean(),
        }


def on_object(rollout: Rollout, box_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return for each image the fraction of chosen locations inside its box: (B,).

    Boxes are xyxy in pixels; `size` is the (H, W) of the images.
    """
    chosen_BRt2 = rollout.location[:, :, -rollout.log_prob.shape[-1] :]
    # −1 and 1 are the centres of the outermost pixels; pixel 0 covers [0, 1)
    sides_2 = chosen_BRt2.new_tensor([size[1], size[0]])
    place_BRt2 = (chosen_BRt2 + 1) / 2 * (sides_2 - 1) + 0.5
    low_B112, high_B112 = box_B4[:, None, None, :2], box_B4[:, None, None, 2:]
    return ((place_BRt2 >= low_B112) & (place_BRt2 <= high_B112)).all(-1).float().mean((1, 2))
