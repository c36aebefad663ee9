"""On Ray: a cluster of two nodes on this machine loses one in each long stage, and finishes."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from vllm_memdec.train.executor.ray_crew import LARGEST_WORKER, alike, slots
from vllm_memdec.train.executor.ray_executor import QUIET, RayExecutor

SETTINGS = {
    "corpus": {"block_tokens": 32, "validation_fraction": 0.02, "shard_blocks": 2},
    "datastore": {"dtype": "float32", "batch_blocks": 1},
    "index": {"kind": "sq8"},
    "targets": {"neighbours": 32},
    "memory": {
        "layers": 1, "epochs": 1, "dtype": "float32", "checkpoint_seconds": 0.2, "batch_blocks": 4,
    },
    "export": {"dtype": "float32"},
}  # fmt: skip
LABELS, CHECKED = "labels-*.npy", "checkpoint.pt"
LOSS = 0.01  # relative: two processes sum in another order, and a lost step is done again


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, english, jsonl):
    return jsonl(tmp_path_factory.mktemp("text") / "corpus.jsonl", english(60))


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory, build, corpus):
    """The same build by one process, without Ray."""
    output = tmp_path_factory.mktemp("alone")
    build(tiny_model("llama"), corpus, output, SETTINGS)
    return output


@pytest.fixture
def ray_cluster(monkeypatch):
    """Yield a cluster of a head without CPUs and two nodes of one CPU, as processes here."""
    from ray.cluster_utils import Cluster

    # A lost node is noticed in a second instead of half a minute.
    impatient = {"period_ms": 500, "timeout_ms": 2000, "failure_threshold": 2}
    health = {f"RAY_health_check_{name}": str(value) for name, value in impatient.items()}
    # Nor does a fresh node start processes before it has work for them.
    idle = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
    for name, value in (QUIET | health | idle).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the nodes would inherit it
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def wait_for(path, pattern, count, process, seconds=300):
    """Wait until a folder holds so many files; fail if the command ends before."""
    until = time.monotonic() + seconds
    while len(list(path.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, f"{path} never had {count} {pattern}"
        time.sleep(0.005)


def lose_a_node(cluster, done):
    """Kill all processes of a node at once, as a power cut would."""
    cluster.remove_node(sorted(cluster.worker_nodes, key=id)[0], allow_graceful=False)
    assert not done.exists(), "the stage ended before the node was lost"


def lose_the_worker(process):
    """Kill the one worker of a local Ray."""
    workers = psutil.Process(process.pid).children(recursive=True)
    [worker] = [w for w in workers if any(word.startswith("ray::Worker") for word in w.cmdline())]
    worker.kill()


def last_loss(output, steps=5):
    rows = [json.loads(r) for r in (output / "memory/logs/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return sum(row["kl"] + row["ce"] for row in rows[-steps:]) / steps


def files(output):
    """Return the names of all files that are sealed."""
    manifests = [json.loads(path.read_text()) for path in output.glob("*/manifest.json")]
    return [f"{manifest['stage']}/{name}" for manifest in manifests for name in manifest["files"]]


def test_a_node_is_lost_in_each_long_stage(tiny_model, command, corpus, alone, hashes, ray_cluster):
    on_ray = command(tiny_model("llama"), corpus, SETTINGS, "on_ray")
    process = on_ray.start(**{"ray-address": ray_cluster.address})
    for stage, pattern, count in (
        ("datastore", LABELS, 5), ("targets", "probs-*.npy", 5), ("memory", CHECKED, 1),
    ):  # fmt: skip
        wait_for(on_ray.output / f"{stage}.partial", pattern, count, process)
        lose_a_node(ray_cluster, on_ray.output / stage)
        ray_cluster.add_node(num_cpus=1)  # or training would wait for one before it goes on
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 0, err
    one, two = hashes(alone), hashes(on_ray.output)
    for stage in ("corpus", "datastore", "index", "targets"):
        assert one[stage] == two[stage], stage
    assert last_loss(on_ray.output) == pytest.approx(last_loss(alone), rel=LOSS)
    assert not list(on_ray.output.rglob("*.tmp")) and not list(
        on_ray.output.glob(".memdec-proof-*")
    )
    assert sorted(files(on_ray.output)) == sorted(files(alone))  # Ray leaves nothing there


def test_the_driver_is_killed(tiny_model, command, corpus, alone, hashes):
    """kill -9, or ctrl-C, on this machine's own Ray: at most one shard is lost.

    Before that its only worker is killed, and another goes on.
    """
    killed = command(tiny_model("llama"), corpus, SETTINGS, "killed")
    datastore, memory = (killed.output / f"{stage}.partial" for stage in ("datastore", "memory"))

    process = killed.start(**{"ray-address": "local"})
    wait_for(datastore, LABELS, 2, process)
    lose_the_worker(process)
    wait_for(datastore, LABELS, 5, process)
    killed.kill(process)
    assert not (killed.output / "datastore").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in datastore.glob(LABELS)}

    process = killed.start(**{"ray-address": "local"})
    wait_for(memory, CHECKED, 1, process)
    said = killed.kill(process, signal.SIGINT)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "Stopped. Run the same command again to go on."
    assert not (killed.output / "memory").exists()
    for name, when in kept.items():  # what was whole is not made again
        assert (killed.output / "datastore" / name).stat().st_mtime_ns == when
    step = torch.load(memory / CHECKED)["step"]

    code, err = killed.run()  # without Ray: the artifacts are the same
    assert code == 0, err
    resumed = int(re.search(r"resuming at step (\d+) of", err)[1])
    assert 1 <= step <= resumed  # what Ray's processes still saved while they ended is not lost
    assert hashes(killed.output) == hashes(alone)


@pytest.mark.parametrize(
    ("nodes", "with_gpus", "without", "in_step"),
    [
        ([{"CPU": 16.0, "GPU": 1.0}], [(8, 1)], [(8, 0)] * 2, 1),
        ([{"CPU": 20.0, "GPU": 8.0}, {"CPU": 64.0}], [(2, 1)] * 8, [(8, 0)] * 10, 8),
        ([{"CPU": 2.0, "GPU": 4.0}], [(0, 1)] * 4, [(2, 0)], 4),  # fewer CPUs than GPUs
        ([{"CPU": 4.0}, {"CPU": 2.0}, {}], [(4, 0), (2, 0)], [(4, 0), (2, 0)], 2),
        # A small machine does not make small the workers of a large one, nor do steps wait for it.
        ([{"CPU": 2.0}, {"CPU": 96.0}], *([[(8, 0)] * 12 + [(2, 0)]] * 2), 12),
    ],
)
def test_workers_share_the_cpus_of_a_machine(monkeypatch, nodes, with_gpus, without, in_step):
    nodes = [*({"Alive": True, "Resources": n} for n in nodes)]
    nodes.append({"Alive": False, "Resources": {"CPU": 1.0}})
    nodes = [n | {"NodeID": str(i), "NodeManagerAddress": str(i)} for i, n in enumerate(nodes)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert LARGEST_WORKER == 8
    assert [(slot.cpus, slot.gpus) for slot in slots()] == with_gpus
    assert [(slot.cpus, slot.gpus) for slot in slots(use_gpus=False)] == without
    assert len(alike(slots())) == in_step


def threads(_=None):
    """Return how many threads torch and faiss start in a worker, cores permitting."""
    return int(os.environ["OMP_NUM_THREADS"])


threads.gpu = True


def test_a_worker_with_a_gpu_has_cpus_too(monkeypatch):
    """On a machine that declares GPUs to Ray; none is used."""
    from ray.cluster_utils import Cluster

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "TRITON_INTERPRET"):  # the nodes would inherit them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    machine = {"num_cpus": 6, "num_gpus": 2, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=machine)
    executor = RayExecutor(nodes.address)
    try:
        assert executor.workers() == 2
        assert executor.call(threads) == 3
        assert set(executor.map(threads, range(2))) == {3}
    finally:
        import ray

        ray.shutdown()
        nodes.shutdown()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("somewhere", "--ray-address must be HOST:PORT, auto, local or none"),
    ],
)
def test_an_address_that_does_not_answer(
    tiny_model, tmp_path, command, english, jsonl, address, says
):
    memdec = command(tiny_model("llama"), jsonl(tmp_path / "corpus.jsonl", english(40)), SETTINGS)
    code, err = memdec.here(**{"ray-address": address})
    assert code == 1 and err.splitlines()[-1].startswith(f"memdec: {says}")
    assert "Traceback" not in err
    assert not list(memdec.output.glob("*/manifest.json"))  # nothing is taken for whole
