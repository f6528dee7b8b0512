"""The multi-token-prediction head of the hybrid model, trained on the frozen trunk."""

import time
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

from tiny_training import forward
from tiny_training.documents import IGNORED, Batches
from tiny_training.optimizer import Optimizer
from tiny_training.rescaling import snap_norms

ROW_LENGTHS = (256, 256, 256, 1024)
DTYPE = torch.float32
TOKENS_PER_STEP = 4096


class PredictionHead(nn.Module):
    """Predict token t + 2 from the trunk's state at t and the embedding of token t + 1."""

    def __init__(self, config: Any) -> None:  # noqa: ANN401
        """Build the modules under their published names."""
        super().__init__()
        size = config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(size, eps=config.rms_norm_eps)
        attention_layer = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, attention_layer)])
        self.norm = Qwen3_5RMSNorm(size, eps=config.rms_norm_eps)

    def forward(self, trunk: Any, hidden: Tensor, following: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        """Return the state to be read by the output embedding."""
        embedded = forward.rms_norm(trunk.model.embed_tokens(following), self.pre_fc_norm_embedding, dtype)
        normed = forward.rms_norm(hidden, self.pre_fc_norm_hidden, dtype)
        x = forward.linear(torch.cat((embedded, normed), -1), self.fc).float()
        rotate = forward.rotation(trunk.model, x.shape[1])
        for layer in self.layers:
            x = forward.decoder_layer(layer, x, rotate, dtype)
        return forward.rms_norm(x, self.norm, dtype)


def head_losses(head: PredictionHead, trunk: Any, ids: Tensor, labels: Tensor, depths: int) -> list[Tensor]:  # noqa: ANN401
    """Mean cross-entropy of the first, second, ... draft of every position.

    Each draft but the first is made from the state that made the one before it, as at inference; only that its
    row attends to rows of the same depth, where at inference it finds those of the first.
    """
    with torch.no_grad():
        # As released heads take it: after the trunk's final norm.
        state = forward.rms_norm(forward.hidden_states(trunk, ids, DTYPE), trunk.model.norm, DTYPE)
    losses: list[Tensor] = []
    for depth in range(1, depths + 1):
        state = head(trunk, state[:, :-1], ids[:, depth:], DTYPE)
        after = labels[:, depth + 1 :]
        wanted = after != IGNORED
        losses.append(F.cross_entropy(forward.linear(state[:, :-1][wanted], trunk.lm_head).float(), after[wanted]))
    return losses


def train_head(
    trunk: Any,  # noqa: ANN401
    batches: Batches,
    minutes: float,
    depths: int = 3,
    head: PredictionHead | None = None,
) -> PredictionHead:
    """Go on with a head, or start from the last attention layer of the trunk, and train against the clock."""
    rate = 1.0 if head is None else 0.3
    if head is None:
        head = PredictionHead(trunk.config)
        head.layers[0].load_state_dict(trunk.model.layers[-1].state_dict())
        with torch.no_grad():
            nn.init.normal_(head.fc.weight, std=head.fc.in_features**-0.5)
    snap_norms(head)
    trunk.requires_grad_(requires_grad=False)
    optimizer = Optimizer(head, muon_rate=0.02, adam_rate=0.004)
    start, step = time.monotonic(), 0
    average = torch.zeros(depths)
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        ids, labels = batches.draw(TOKENS_PER_STEP // length, length, progress=1.0)
        losses = head_losses(head, trunk, ids, labels, depths)
        torch.stack(losses).sum().backward()
        optimizer.step(rate * min(1.0, 1.01 - progress))
        found = torch.stack(losses).detach()
        average = found if step == 0 else 0.95 * average + 0.05 * found
        step += 1
        if step % 25 == 0:
            drafts = "  ".join(f"{loss:.3f}" for loss in average.tolist())
            print(f"head step {step}  {progress:.1%}  loss by draft {drafts}", flush=True)
    trunk.requires_grad_(requires_grad=True)
    return head
