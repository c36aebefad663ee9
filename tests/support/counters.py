"""Our counters in this process, as the metrics endpoint shows them."""

from prometheus_client import REGISTRY

PREFIX, END = "memdec:", "_total"


def read():
    """Return {(figure, memory): value}."""
    return {
        (sample.name.removeprefix(PREFIX).removesuffix(END), sample.labels["memory"]): sample.value
        for family in REGISTRY.collect()
        if family.name.startswith(PREFIX)
        for sample in family.samples
        if sample.name.endswith(END)
    }


def grown(before):
    """Return {figure: {memory: growth}} since an earlier read(), without what did not grow."""
    found = {}
    for (figure, memory), value in read().items():
        if growth := value - before.get((figure, memory), 0.0):
            found.setdefault(figure, {})[memory] = growth
    return found


def drafts(answer):
    """Return how many tokens were drafted for an answer, and how many it took; 0 if not counted."""
    metrics = answer.spec_decode_metrics
    if metrics is None:
        return 0, 0
    return metrics.num_draft_tokens, sum(n * count for n, count in enumerate(metrics.histogram))
