"""What training with dense targets does in plain PyTorch, the step that ours is compared with.

Shape suffixes: N rows, V vocabulary.
"""

import torch
import torch.nn.functional as F

PER_ROW = 16  # tokens of a row's target; the demo's have 19


def dense_targets(targets, N, V):
    """Return targets [N, V], as a collator that knows no sparse loss has to make them."""
    row, token, p = targets.entries()
    return torch.zeros(N, V, device=p.device).index_put_((row, token), p)


def losses(logits_NV, labels_N, target_NV):
    """Return KL and cross-entropy, summed."""
    logq_NV = F.log_softmax(logits_NV.float(), -1)
    kl = F.kl_div(logq_NV, target_NV, reduction="sum")
    return kl, F.nll_loss(logq_NV, labels_N, reduction="sum")
