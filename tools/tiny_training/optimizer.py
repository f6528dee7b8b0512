"""One optimizer for a model's matrices and for everything else."""

import torch
from torch import nn

from tiny_training.muon import Muon

NOT_MATRICES = ("embed", "conv1d", "gate.weight")  # what Muon does not suit: lookups, filters, routers


class Optimizer:
    """Muon for the layers' matrices, AdamW for the rest."""

    def __init__(self, model: nn.Module, muon_rate: float, adam_rate: float, decay: float = 0.0) -> None:
        """Split the trainable parameters."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = {name: p for name, p in named if p.ndim > 1 and not any(x in name for x in NOT_MATRICES)}
        self._parameters = [p for _, p in named]
        self._muon = Muon(matrices.values(), decay=decay)
        others = [p for name, p in named if name not in matrices]
        self._adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._rates = muon_rate, adam_rate

    def step(self, factor: float) -> None:
        """Clip, update at the scheduled share of the learning rates, clear the gradients."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._muon.step(self._rates[0] * factor)
        for group in self._adam.param_groups:
            group["lr"] = self._rates[1] * factor
        self._adam.step()
        for parameter in self._parameters:
            parameter.grad = None
