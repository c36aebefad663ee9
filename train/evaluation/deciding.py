"""Who decided a token, the base or the memory: one rule for all that tells of it."""


def share_of_memory(alpha: float, base: float, memory: float) -> float:
    """Return the share of the mixture's probability of a token that came from the memory.

    alpha: the memory's weight; base, memory: probabilities that the two give to the token.
    """
    parts = alpha * memory, (1 - alpha) * base
    return parts[0] / sum(parts) if sum(parts) > 0 else alpha


def decided_by(share: float) -> str:
    """Return who gave the larger part of a token's probability."""
    return "memory" if share > 0.5 else "base"
