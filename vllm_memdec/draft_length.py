"""How many tokens the memories should draft: the number that gives the most tokens a second.

All of it is measured while serving. A step verifies n tokens in step(n) seconds, a pass of the
memories over B requests takes pass(B); a request whose drafts are accepted with probability beta
gets (1 - beta^(k+1)) / (1 - beta) tokens of k drafts. So the length follows the machine, the batch
size, the text and the weights that requests ask for.
"""

from collections.abc import Sequence

MAX_DRAFTS = 6  # a step
WARM_UP = 2 * MAX_DRAFTS  # steps in which every length is tried
EXPLORED = 16  # one step in so many tries the next length, or what is known would grow old
DECAY = 0.98  # share of an observation that counts after one more
PRIOR = 2.0  # drafts that stand for a new request: the average of the others


class LatencyModel:
    """Seconds of a pass, linear in its number of tokens: least squares in which old points fade."""

    def __init__(self) -> None:
        self.sums = [0.0] * 5  # of 1, n, s, n*n, n*s

    def add(self, tokens: int, seconds: float) -> None:
        point = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self.sums = [DECAY * old + new for old, new in zip(self.sums, point, strict=True)]

    @property
    def known(self) -> bool:
        """Whether there is a point at all."""
        return self.sums[0] > 0

    def __call__(self, tokens: int) -> float:
        """Return seconds; no more tokens take less time."""
        count, n, s, nn, ns = self.sums
        mean_n, mean_s = n / count, s / count
        spread = nn / count - mean_n**2
        # One number of tokens alone gives no slope.
        slope = max(0.0, (ns / count - mean_n * mean_s) / spread) if spread > 1e-3 else 0.0
        return max(mean_s + slope * (tokens - mean_n), 0.1 * mean_s)


class DraftLength:
    """Chooses the number of drafts of each step of a server, up to `max_drafts`."""

    def __init__(self, max_drafts: int = MAX_DRAFTS):
        self.max_drafts = max_drafts
        self.step, self.passes = LatencyModel(), LatencyModel()
        self.pool = [1.0, 1.0]  # accepted and refused drafts of all requests
        self.requests: dict[str, list[float]] = {}  # the same by request
        self.steps = 0

    def observe(self, request: str, drafted: int, accepted: int) -> None:
        """Count a request's accepted drafts; those after a refused one teach nothing."""
        counted = (accepted, float(accepted < drafted))
        for counts in (self.pool, self.requests.setdefault(request, [0.0, 0.0])):
            counts[:] = (DECAY * old + new for old, new in zip(counts, counted, strict=True))

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
            return 1 + self.steps % self.max_drafts
        tokens = [1.0] * len(drafted)  # expected of each request
        reached = [1.0] * len(drafted)  # probability that all drafts so far are accepted
        rates = [self.acceptance(name) for name in drafted]
        best, length = 0.0, 0
        for k in range(self.max_drafts + 1):
            n = others + len(drafted) * (k + 1)
            speed = (others + sum(tokens)) / (self.step(n) + k * self.passes(len(drafted)))
            if speed > best:
                best, length = speed, k
            reached = [p * rate for p, rate in zip(reached, rates, strict=True)]
            tokens = [t + p for t, p in zip(tokens, reached, strict=True)]
        if self.steps % EXPLORED == 0:
            # One more or one less: six drafts where one is best would cost two steps' time.
            other = length + (1 if self.steps // EXPLORED % 2 else -1)
            length = min(max(other, 1), self.max_drafts)
        return length
