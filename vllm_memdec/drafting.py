"""What a memory has drafted, and how many tokens it should draft.

A memory that drafts reads all tokens that will be verified but the last: a Draft keeps what it said
of them.

The length is what gives the most tokens a second, by measurement. A step verifies n tokens in
step(n) seconds, a pass of the memories over B requests takes pass(B); a request whose drafts are
accepted with probability beta gets (1 - beta^(k+1)) / (1 - beta) tokens of k drafts. All three are
learnt while serving, so the length follows the machine, the batch size, the text and the weights
that requests ask for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST = 6  # drafts a step
WARM_UP = 2 * MOST  # steps in which every length is tried
EXPLORED = 16  # one step in so many tries the next length, or what is known would grow old
MEMORY = 0.98  # share of an observation that counts after one more
PRIOR = 2.0  # drafts that stand for a new request: the average of the others


@dataclass(frozen=True)
class Draft:
    """What one memory said in its last K passes over B requests; R = B * K rows, by request."""

    requests: dict[str, int]  # their places among the B
    positions: list[int]  # of the first token of each
    tokens: list[list[int]]  # [B, K + 1]: those it read, and the last draft
    hidden_RD: torch.Tensor
    logits_RW: torch.Tensor

    def said(self, request: str, position: int, tokens: Sequence[int]) -> range:
        """Return the rows of the first tokens of what is to be verified: all but the last, or none.

        position: that of the first of the tokens.
        """
        number = self.requests.get(request)
        if number is None or position != self.positions[number]:
            return range(0)
        if list(tokens) != self.tokens[number][: len(tokens)]:
            return range(0)
        first = number * (len(self.tokens[number]) - 1)
        return range(first, first + len(tokens) - 1)


class Line:
    """Seconds as a line over a number of tokens: least squares, in which old points fade."""

    def __init__(self) -> None:
        self.sums = [0.0] * 5  # of 1, n, s, n*n, n*s

    def add(self, tokens: int, seconds: float) -> None:
        point = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self.sums = [MEMORY * old + new for old, new in zip(self.sums, point, strict=True)]

    @property
    def known(self) -> bool:
        """Whether there is a point at all."""
        return self.sums[0] > 0

    def __call__(self, tokens: int) -> float:
        """Return seconds; no more tokens take less time."""
        count, n, s, nn, ns = self.sums
        mean_n, mean_s = n / count, s / count
        spread = nn / count - mean_n**2
        # Of one number of tokens alone no slope can be told.
        slope = max(0.0, (ns / count - mean_n * mean_s) / spread) if spread > 1e-3 else 0.0
        return max(mean_s + slope * (tokens - mean_n), 0.1 * mean_s)


class DraftLength:
    """Chooses the number of drafts of each step of a server, up to `most`."""

    def __init__(self, most: int = MOST):
        self.most = most
        self.step, self.passes = Line(), Line()
        self.pool = [1.0, 1.0]  # accepted and refused drafts of all requests
        self.requests: dict[str, list[float]] = {}  # the same by request
        self.steps = 0

    def observe(self, request: str, drafted: int, accepted: int) -> None:
        """Take note of what became of a request's drafts; those after a refused one say nothing."""
        found = (accepted, float(accepted < drafted))
        for counts in (self.pool, self.requests.setdefault(request, [0.0, 0.0])):
            counts[:] = (MEMORY * old + new for old, new in zip(counts, found, strict=True))

    def acceptance(self, request: str) -> float:
        """Return the probability that a request's next draft is accepted."""
        accepted, refused = self.pool
        average = accepted / (accepted + refused)
        accepted, refused = self.requests.get(request, (0.0, 0.0))
        return (accepted + PRIOR * average) / (accepted + refused + PRIOR)

    def keep(self, requests: Sequence[str]) -> None:
        """Forget all requests but these."""
        self.requests = {name: self.requests[name] for name in requests if name in self.requests}

    def choose(self, drafted: Sequence[str], others: int = 0) -> int:
        """Return a length for these requests, beside others that are not drafted for."""
        self.steps += 1
        if self.steps <= WARM_UP or not (self.step.known and self.passes.known):
            return 1 + self.steps % self.most
        tokens = [1.0] * len(drafted)  # expected of each request
        reached = [1.0] * len(drafted)  # probability that all drafts so far are accepted
        rates = [self.acceptance(name) for name in drafted]
        best, length = 0.0, 0
        for k in range(self.most + 1):
            n = others + len(drafted) * (k + 1)
            speed = (others + sum(tokens)) / (self.step(n) + k * self.passes(len(drafted)))
            if speed > best:
                best, length = speed, k
            reached = [p * rate for p, rate in zip(reached, rates, strict=True)]
            tokens = [t + p for t, p in zip(tokens, reached, strict=True)]
        if self.steps % EXPLORED == 0:
            # One more or one less: six drafts where one is best would cost two steps' time.
            other = length + (1 if self.steps // EXPLORED % 2 else -1)
            length = min(max(other, 1), self.most)
        return length
