"""On Ray, with machines that do not share /tmp: errors, deaths, machines that come and go.

A machine is a Ray node in mount and network namespaces of its own: it has another address, another
/tmp, one folder that it shares with the driver, and a small disk that fills up at once. As on many
machines, the name of the host stands for loopback.
"""

import contextlib
import errno
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import psutil
import pytest
import yaml
from support.ray_jobs import DIE, Deadly, Growing, Loop, MakeFolder, Slow, noted

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.executor.ray_crew import TRIES, slots
from vllm_memdec.train.executor.ray_executor import QUIET, RayExecutor
from vllm_memdec.train.faults import sentence_of

SOON = 60.0  # seconds; a collective operation would wait for half an hour
NODE = """
set -e
mount -t tmpfs tmpfs /mnt
seen=("$SHARED")
for path in "$CODE" "$VENV"; do  # where they lie below /tmp
  case $path in /tmp/*) seen+=("$path") ;; esac
done
for path in "${seen[@]}"; do
  mkdir -p "/mnt$path"
  mount --bind "$path" "/mnt$path"
done
mount -t tmpfs tmpfs /tmp
for path in "${seen[@]}"; do
  mkdir -p "$path"
  mount --bind "/mnt$path" "$path"
done
mkdir -p "$DISK"
mount -t tmpfs -o size=64k tmpfs "$DISK"
exec "$PYTHON" -c 'from ray.scripts.scripts import main; main()' \
    start --address="$ADDRESS" --node-ip-address="$OWN" --num-cpus="$CPUS" --block
"""


def ip(*words: str) -> None:
    """Run the command of that name."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


def can_unshare() -> bool:
    """Tell whether this process may make namespaces."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        return False
    words = ["unshare", "-m", "-n", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(words, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs mount and network namespaces")


class Machines:
    """A head without CPUs in the test's own file system, and nodes in others."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        # Below /tmp, wherever pytest has its folders: that is what the nodes have of their own.
        self.shared, self.hidden, self.disk = (folder / n for n in ("shared", "hidden", "disk"))
        for path in (self.shared, self.hidden):
            path.mkdir()
        # Of the range for tests of networks (RFC 2544).
        self.name, self.network = f"md{os.getpid()}", f"198.18.{os.getpid() % 256}"
        ip("link", "add", self.name, "type", "bridge")
        ip("addr", "add", f"{self.network}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        here = {"node_ip_address": f"{self.network}.1", "include_dashboard": False}
        self.head = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | here)
        self.address, self.nodes, self.made = self.head.address, {}, 0

    def add(self, cpus: int = 1) -> None:
        """Start a machine."""
        self.made += 1
        name, address = f"{self.name}-{self.made}", f"{self.network}.{self.made + 1}"
        outside, inside = (f"{end}{os.getpid()}-{self.made}" for end in "vw")
        ip("netns", "add", name)
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        ip("link", "set", outside, "master", self.name, "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", inside)
        for device in ("lo", inside):
            ip("-n", name, "link", "set", device, "up")
        places = {"SHARED": self.shared, "DISK": self.disk, "CPUS": cpus, "PYTHON": sys.executable}
        places |= {"CODE": Path(__file__).parents[2], "VENV": sys.prefix}
        places |= {"ADDRESS": self.address, "OWN": address, "TMPDIR": "/tmp"}
        within = ["ip", "netns", "exec", name, "unshare", "-m", "--propagation", "private"]
        self.nodes[name] = subprocess.Popen(
            [*within, "bash", "-c", NODE],
            env=os.environ | {key: str(value) for key, value in places.items()},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def lose(self) -> None:
        """Kill all processes of the oldest machine at once, as a power cut would."""
        name = next(iter(self.nodes))
        node = self.nodes.pop(name)
        main = psutil.Process(node.pid)
        for process in [*main.children(recursive=True), main]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(10)
        ip("netns", "del", name)

    def close(self) -> None:
        """End all."""
        while self.nodes:
            self.lose()
        self.head.shutdown()
        ip("link", "del", self.name)

    def wait_for(self, count: int) -> None:
        """Wait until Ray knows so many nodes."""
        until = time.monotonic() + 60
        while len(slots()) != count:
            assert time.monotonic() < until, [node.poll() for node in self.nodes.values()]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Yield two machines of one CPU, joined to a Ray that notices a loss within seconds."""
    import ray

    impatient = {"period_ms": 500, "timeout_ms": 2000, "failure_threshold": 2}
    health = {f"RAY_health_check_{name}": str(value) for name, value in impatient.items()}
    idle = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET | health | idle).items():
            patch.setenv(name, value)
        patch.delenv("TRITON_INTERPRET", raising=False)  # the nodes would inherit it
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
        started = Machines(tmp_path_factory.mktemp("machines"))
        try:
            for _ in range(2):
                started.add()
            ray.init(
                address=started.address,
                _node_ip_address=f"{started.network}.1",
                logging_level="ERROR",
                log_to_driver=False,
            )
            started.wait_for(2)
            yield started
        finally:
            ray.shutdown()
            started.close()


@pytest.fixture(scope="module")
def cluster(machines):
    """Return what runs work on the machines."""
    return RayExecutor(machines.address, machines.shared)


@pytest.fixture
def folder(machines):
    """Return an empty folder that all machines see."""
    path = Path(tempfile.mkdtemp(dir=machines.shared))
    (path / "work").mkdir()
    return path


@contextlib.contextmanager
def soon(seconds=SOON):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.mark.parametrize(
    ("what", "rank"), [("full disk", 0), ("full disk", 1), ("mistake", 1), ("defect", 0)]
)
def test_an_error_of_any_rank_ends_all(machines, cluster, folder, what, rank):
    """At once, once, and with its cause: the others wait in a collective operation."""
    loop = Loop(folder, what, rank, disk=str(machines.disk))
    error = {"full disk": OSError, "mistake": MemdecError, "defect": KeyError}[what]
    with soon(), pytest.raises(error) as raised:
        cluster.train(loop, folder / "work")
    assert noted(folder) == [f"{rank}/2"]  # not repeated
    shown = "".join(traceback.format_exception(raised.value))
    assert "in a worker on" in shown and inspect.getfile(Loop) in shown
    if what == "full disk":
        assert raised.value.errno == errno.ENOSPC
        assert sentence_of(raised.value).startswith("the disk is full")


def test_a_training_that_is_lost_again_and_again_ends(cluster, folder):
    with soon(), pytest.raises(MemdecError, match=f"lost {TRIES} times without a checkpoint"):
        cluster.train(Loop(folder, "killed", rank=1), folder / "work")
    assert noted(folder) == ["1/2"] * TRIES


def test_a_training_that_gets_on_is_not_given_up(cluster, folder):
    """A machine that is taken away every hour would end any run after so many losses in all."""
    cluster.train(Loop(folder, "exit", checkpoints=TRIES), folder / "work")
    assert noted(folder) == ["0/2"] * (TRIES + 1)


@pytest.mark.parametrize("how", DIE)
def test_an_item_that_always_ends_its_process(cluster, folder, how):
    with soon(), pytest.raises(MemdecError) as raised:
        list(cluster.map(Deadly(folder, how, deadly=2), range(8)))
    assert str(raised.value).startswith(f"Deadly 2 was tried {TRIES} times and its process ended")
    assert "out of memory" in str(raised.value) and str(raised.value).endswith("settings.")
    done = noted(folder)
    assert done.count("2") == TRIES and max(map(done.count, done)) == TRIES
    assert {"0", "1"} <= set(done)  # what others did is kept


def test_a_call_that_always_ends_its_process(cluster, folder):
    with soon(), pytest.raises(MemdecError, match=f"Deadly.__call__ was tried {TRIES} times"):
        cluster.call(Deadly(folder, "killed", deadly=1).__call__, 1)


def test_a_folder_of_the_same_name_is_not_shared(machines, cluster, monkeypatch):
    """The node has one of that name, as `mkdir -p` on every machine makes it, but another."""
    list(cluster.map(MakeFolder(str(machines.hidden)), range(4)))
    monkeypatch.setattr(cluster, "shared", machines.hidden)
    monkeypatch.setattr(cluster, "option", "--work")
    with pytest.raises(MemdecError, match=f"does not see {machines.hidden}: give --work on"):
        list(cluster.map(Slow(0), range(2)))
    assert not list(machines.hidden.iterdir()) and not list(machines.shared.glob(".memdec*"))


def test_a_plan_needs_a_folder_that_is_shared(
    machines, cluster, folder, tiny_model, memdec_here, english, jsonl, quick
):
    cluster.crew.close()
    corpus = jsonl(folder / "corpus.jsonl", english(40))
    base = shutil.copytree(tiny_model("llama"), folder / "base")
    (folder / "quick.yaml").write_text(yaml.safe_dump(quick()))
    words = ["plan", "--base", base, "--corpus", corpus, "--config", folder / "quick.yaml"]
    words += ["--ray-address", machines.address]
    code, _, err = memdec_here(*words)
    assert code == 1 and "give --work on storage that all nodes share" in err.splitlines()[-1]
    code, _, err = memdec_here(*words, "--work", folder / "nowhere")
    assert code == 1 and "nowhere is no folder: create it, or check --work." in err


def test_machines_come_and_go(machines, cluster, folder):
    """One is lost amid a stage: others do its work. One comes: it is used in the same stage."""
    results, done = cluster.map(Slow(0.1), range(3000)), {}

    def do_until(enough):
        while not enough():
            item, node = next(results)
            assert item not in done
            done[item] = node

    def machines_used():
        return len(set(done.values()))

    with soon():
        do_until(lambda: machines_used() == 2)
        machines.lose()
        machines.add()
        do_until(lambda: machines_used() == 3)
        # Ray may tell of the loss after the new machine has worked: items of the lost one follow.
        do_until(lambda: set(done) >= set(range(max(done) - 4)))
    results.close()


def test_a_machine_that_comes_is_trained_on(machines, cluster, folder):
    machines.lose()
    machines.wait_for(1)
    thread = threading.Timer(3, machines.add)
    thread.start()
    cluster.train(Growing(folder), folder / "work")
    thread.join()
    assert noted(folder)[0] == "0/1" and set(noted(folder)[1:]) == {"0/2", "1/2"}
