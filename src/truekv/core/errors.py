"""Every way the engine says no: one sentence that names what, where and what to use instead."""


class TrueKVError(Exception):
    """Base of every error raised on purpose; its text is meant for the user as it is."""

    exit_code = 1


class Refused(TrueKVError):
    """Input or a combination that cannot be run as asked; raised before anything is allocated."""

    exit_code = 2


class DoesNotFit(Refused):
    """A plan whose needs exceed the memory it was given."""

    exit_code = 1


class Corrupted(TrueKVError):
    """A number that cannot be trusted, caught before it became a token."""

    exit_code = 2

    def __init__(self, sentence: str, *, layer: str | None = None) -> None:
        """Say what is wrong, and in which layer where that is known."""
        super().__init__(sentence)
        self.layer = layer

    @classmethod
    def rows(cls, broken: int, rows: int) -> "Corrupted":
        """Say how many of the rows that were to be stored are not finite."""
        return cls(
            f"{broken} of {rows} cache rows hold NaN or infinity before encoding; "
            "the step is lost: check the weights and the compute dtype"
        )


class OutOfMemory(TrueKVError):
    """A step whose tensors have no room on the device beside the weights and the cache."""

    @classmethod
    def step(cls, tokens: int, sequences: int) -> "OutOfMemory":
        """Say what the step was, and what makes it smaller."""
        return cls(
            f"a step of {tokens} token{'s' * (tokens > 1)} for {sequences} sequence{'s' * (sequences > 1)} has no room "
            "on the device beside the weights and the cache; lower --max-num-batched-tokens or max_num_seqs, shorten "
            "the context with --max-model-len, or give the cache less memory"
        )


class ConstraintFailed(TrueKVError):
    """An answer that its grammar does not let go on: a dead end, or a step beyond the limits of work."""
