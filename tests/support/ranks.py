"""A worker whose second rank computes a whole memory otherwise than the first."""

import torch


class Rank:
    """Mixed into vLLM's worker by `worker_extension_cls`."""

    def disturb(self):
        """Let hidden states of the memory "whole" differ on all ranks but the first."""
        composite = self.model_runner.get_model()
        number = composite.choices.names.index("whole")
        memory = composite.memories[number]
        forward, logits, self.rows_seen = memory.module.forward, memory.logits, []

        def disturbed(*args, **kwargs):
            rows = forward(*args, **kwargs)
            return rows if self.rank == 0 else rows * 1.01

        def recorded(mine_ND):
            self.rows_seen.append(mine_ND.double().sum().item())
            return logits(mine_ND)

        memory.module.forward, memory.logits = disturbed, recorded
        assert torch.distributed.get_world_size() == 2

    def seen(self):
        """Return sums of the rows that the memory's head was given."""
        return self.rows_seen
