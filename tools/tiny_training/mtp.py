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


def head_logits(head: PredictionHead, trunk: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
    """Predict tokens 2.. of each row; the result has two positions less than the row."""
    with torch.no_grad():
        # As released heads take it: after the trunk's final norm.
        hidden = forward.rms_norm(forward.hidden_states(trunk, ids, dtype), trunk.model.norm, torch.float32)
    state = head(trunk, hidden[:, :-2], ids[:, 1:-1], dtype)
    return forward.linear(state, trunk.lm_head).float()


def train_head(trunk: Any, batches: Batches, minutes: float, dtype: torch.dtype) -> PredictionHead:  # noqa: ANN401
    """Start from the last attention layer of the trunk and train against the clock."""
    head = PredictionHead(trunk.config)
    head.layers[0].load_state_dict(trunk.model.layers[-1].state_dict())
    with torch.no_grad():
        nn.init.normal_(head.fc.weight, std=head.fc.in_features**-0.5)
    snap_norms(head)
    trunk.requires_grad_(requires_grad=False)
    optimizer = Optimizer(head, muon_rate=0.02, adam_rate=0.004)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        ids, labels = batches.draw(TOKENS_PER_STEP // length, length, progress=1.0)
        wanted = labels[:, 2:] != IGNORED
        predicted = head_logits(head, trunk, ids, dtype)[wanted]
        loss = F.cross_entropy(predicted, labels[:, 2:][wanted])
        loss.backward()
        optimizer.step(min(1.0, 1.01 - progress))
        step += 1
        if step % 25 == 0:
            right = (predicted.argmax(-1) == labels[:, 2:][wanted]).float().mean()
            print(f"head step {step}  {progress:.1%}  loss {loss:.4f}  accuracy {right:.3f}", flush=True)
    trunk.requires_grad_(requires_grad=True)
    return head
