"""An LLM on two tensor-parallel ranks, over gloo, in a process of its own."""

import json
import os
import subprocess
import sys

OPTIONS = {
    "model_impl": "memdec",
    "tensor_parallel_size": 2,
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 100,
    "disable_log_stats": True,
}


def run(script, base, block, job, env):
    """Return the lists of lists that a script prints, a line of JSON each.

    script: its only argument is JSON of the job, with arguments of LLM as "llm". block: of memdec.
    """
    llm = {"model": base, "additional_config": {"memdec": block}, **OPTIONS}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps({"llm": llm, **job})],
        # Each rank is a process anyhow; the scheduler of both need not be one more.
        env=env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
