"""The seams: a new file behind one of these needs no edit anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.config import Config
    from truekv.core.errors import Corrupted
    from truekv.core.lazy import torch
    from truekv.core.spec import Field, Live, ModelSpec, Recurrent
    from truekv.core.weights import Weights


@runtime_checkable
class CacheFormat(Protocol):
    """A pure codec with a declared bound: |decode(encode(x)) - x| <= bound(x) for any finite row.

    A row is encoded once and never re-encoded. Bytes are laid out as planes (codes first, then
    scales), because a page keeps all codes of a head together and all scales after them.
    """

    @property
    def name(self) -> str:
        """The name users type."""
        ...

    @property
    def code_bits(self) -> int:
        """Bits of one code, scales not counted."""
        ...

    @property
    def rotated(self) -> bool:
        """Whether rows pass through the random-sign Hadamard rotation of their frame."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether it may only run with a frame measured on the model."""
        ...

    @property
    def idempotent(self) -> bool:
        """Whether encode(decode(code)) == code for every code that encode can make."""
        ...

    def planes(self, dim: int) -> tuple[int, ...]:
        """Bytes of one row in each plane: the only place where bytes are computed."""
        ...

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [..., dim] as uint8 [..., sum(planes(dim))]; non-finite rows raise Corrupted."""
        ...

    def decode(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        """Decode uint8 [..., sum(planes(dim))] to float32 [..., dim]."""
        ...

    def bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Largest absolute error of each element or row: broadcastable to rows."""
        ...


class RowFrame(Protocol):
    """What happens to a row once, outside of the loop that reads the cache; see formats/frame.py."""

    @property
    def centre(self) -> torch.Tensor | None:
        """Float32 [heads, dim] that is subtracted first, or None."""
        ...

    @property
    def scale(self) -> torch.Tensor | None:
        """Float32 [heads, dim] that rows are divided by then, or None."""
        ...

    @property
    def rotated(self) -> bool:
        """Whether rows are multiplied by the Hadamard matrix last."""
        ...

    def rotation(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return that matrix in parts, for kernels: signs float64 [dim] and Paley's matrix float64 [P, P].

        H = (P kron S) diag(signs) / sqrt(dim), where S is Sylvester's matrix of order dim / P.
        """
        ...

    def rows(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Take rows [T, heads, dim] into the frame: what the codec encodes, float32."""
        ...

    def query(self, q_TQD: torch.Tensor) -> torch.Tensor:
        """Take queries [T, query heads, dim] into the frame, where they meet stored keys."""
        ...

    def output(self, o_TQD: torch.Tensor) -> torch.Tensor:
        """Take averages [T, query heads, dim] of stored rows out of the frame."""
        ...


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Stored:
    """One field of one layer as it lies in memory, for kernels to read and write.

    `data` is the layer's uint8 tensor [pages, page_bytes]. Inside a page, from `start`, each head
    holds its planes one after the other, each plane `page_tokens` rows long.
    """

    field: Field
    format: CacheFormat
    frame: RowFrame
    data: torch.Tensor
    start: int
    page_tokens: int

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of this field in one page."""
        return self.page_tokens * sum(self.format.planes(self.field.dim))


class PagedMemory(Protocol):
    """What an attention layer sees of memory: one verb, and no bytes."""

    def attend(
        self, queries: tuple[torch.Tensor, ...], rows: tuple[torch.Tensor, ...], scale: float, step: Step
    ) -> torch.Tensor:
        """Store this step's rows, then attend causally to every stored row, these included.

        `rows`: one [T, heads, dim] per field, in the order of the spec. `queries`: one
        [T, query_heads, dim] per field of role "key" or "both", rotary applied. The score is
        scale * sum over those fields of q . k. Returns [T, query_heads, dim of the value field].
        """
        ...


class StateMemory(Protocol):
    """What a recurrent layer sees of memory: one verb, and no slots."""

    def scan(self, inputs: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], step: Step) -> torch.Tensor:
        """Carry the state through the step's tokens and return the rule's output, [T, ...].

        `inputs`: the tensors of the layer's `Recurrent.log`, [T, *shape] each. `weights`: what the
        rule needs besides (conv taps, decay). Output and arguments are the rule's: see
        kernels/reference/<rule>.py.
        """
        ...


LayerMemory = PagedMemory | StateMemory | None


class Model(Protocol):
    """Tokens and memory in, numbers out. Holds weights and nothing else."""

    @property
    def spec(self) -> ModelSpec:
        """What this model is."""
        ...

    @property
    def draft_head(self) -> DraftHead | None:
        """The multi-token-prediction head, if the checkpoint was loaded with it."""
        ...

    def forward(self, step: Step, memory: Seq[LayerMemory]) -> torch.Tensor:
        """Return the last residual [T, hidden_size], before the final norm."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm and the output head: [N, hidden_size] -> float32 [N, vocab_size]."""
        ...


class DraftHead(Protocol):
    """A multi-token-prediction head: from the trunk's state at a token and the token after it to the one after that.

    It has rows of its own, in the draft layers of the same plan: row t is made of the state at token t
    and the embedding of token t + 1.
    """

    def begin(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the trunk's residuals [T, hidden_size] to the states that a first `forward` reads."""
        ...

    def forward(self, state: torch.Tensor, step: Step, memory: Seq[LayerMemory]) -> torch.Tensor:
        """Map states [T, hidden_size] to the states one token on, which `logits` and a next `forward` read.

        `step.tokens` are the tokens that follow each state's, `step.positions` the states' own.
        """
        ...

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Map states that `forward` returned, [N, hidden_size], to float32 [N, vocab_size]: the token after next."""
        ...


class Architecture(Protocol):
    """A checkpoint's config, understood: made by a Family before any weight is read."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is and what its layers remember."""
        ...

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor that `build` consumes."""
        ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Regular expressions (full match) of tensors a checkpoint may hold and text inference does not use."""
        ...

    @property
    def live(self) -> tuple[Live, ...]:
        """What its layers' halves need for each token of a step, those of a head among `tensors` too."""
        ...

    def with_draft_head(self) -> Architecture:
        """Return the same with the multi-token-prediction head among its tensors; raises Refused where it has none."""
        ...

    def build(self, weights: Weights) -> Model:
        """Compose the model; `weights` holds exactly `tensors`, in the compute dtype, and the operations on them."""
        ...


class Family(Protocol):
    """One file of models/families: `FAMILY: Final[Family]`."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """The values of config.json's model_type that it answers to."""
        ...

    def read(self, config: Config) -> Architecture:
        """Understand a config, refusing every field that is not implemented and not neutral. No torch."""
        ...


class Proposer(Protocol):
    """Guesses the next tokens. It cannot see memory, so it can be wrong but never harmful."""

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Guess up to `limit` tokens that continue `tokens`."""
        ...


class Observer(Protocol):
    """Looks on while the engine runs. It reports what it notices, and changes no answer."""

    def before_step(self, requests: Seq[int], tokens: int) -> None:
        """Learn which requests the next step serves, in the order of its chunks, and how many tokens it runs."""
        ...

    def after_tokens(self, request: int, tokens: Seq[int], prompt: int) -> None:
        """See a request's tokens after some were sampled: all of them, of which the first `prompt` were given."""
        ...

    def fault(self, request: int, error: Corrupted) -> None:
        """Learn that a request is ended because its numbers cannot be trusted."""
        ...

    def end(self, request: int) -> None:
        """Forget a request: it was answered, aborted or failed."""
        ...

    def report(self) -> dict[str, Any]:
        """Return what was noticed so far, as JSON can hold it."""
        ...


class ScanKernel(Protocol):
    """One recurrent rule: folds the replayed and the certain tokens into the state, logs the drafts."""

    def __call__(
        self,
        layer: Recurrent,
        inputs: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        log: Mapping[str, torch.Tensor],
        step: Step,
    ) -> torch.Tensor:
        """`state`: [slots, *shape] and `log`: [slots, drafts, *shape] tensors, updated in place."""
        ...
