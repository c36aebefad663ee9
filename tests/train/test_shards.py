"""Arrays in shards: reading is that of the whole array, and a damaged file is named."""

import collections
import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import build_artifact, file_sha256, write_atomic
from vllm_memdec.train.data.shards import (
    Sharded,
    load_shard,
    save_array,
    shard_path,
    shards,
    unfinished,
)

WHOLE = np.arange(46, dtype=np.int32).reshape(23, 2)


@pytest.fixture
def array(tmp_path):
    for n, start in enumerate(range(0, 23, 5)):
        save_array(shard_path(tmp_path, "a", n), WHOLE[start : start + 5])
    return Sharded(tmp_path, "a", 23, 5)


@pytest.mark.parametrize(
    "index",
    [slice(None), slice(3, 17), slice(20, 99), slice(4, 4), 0, 22, np.array([22, 0, 7, 7, 4])],
)
def test_reading_is_that_of_the_whole(array, index):
    assert np.array_equal(array[index], WHOLE[index])
    assert len(array) == 23 and array.shape == (23, 2) and array.n_shards == 5
    assert np.array_equal(np.stack(list(array)), WHOLE)


@pytest.mark.parametrize("index", [23, -1, np.array([0, 40])])
def test_rows_beyond_the_array(array, index):
    with pytest.raises(IndexError, match="rows must be from 0 to 22"):
        array[index]


def test_shards_are_in_order_of_their_numbers(tmp_path):
    for n in (3, 100_000, 99_999):
        save_array(shard_path(tmp_path, "a", n), np.array([n]))
    assert [int(a[0]) for a in shards(tmp_path, "a")] == [3, 99_999, 100_000]


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_cut_off_file_is_named(array, tmp_path, left):
    path = shard_path(tmp_path, "a", 1)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="a-00001.npy is damaged or missing: delete the folder"):
        load_shard(tmp_path, "a", 1)


def test_what_a_lost_process_left_half_written_is_no_part_of_an_artifact(tmp_path):
    def make(work):
        (work / "whole").write_text("whole")
        (work / "deeper").mkdir()
        (work / "deeper/checkpoint.pt.01234567.tmp").write_text("ha")

    artifact = build_artifact(tmp_path / "memory", "memory", {}, {}, make, lambda line: None)
    assert list(artifact.manifest["files"]) == ["whole"]
    assert not list(artifact.path.rglob("*.tmp"))


def test_the_same_settings_are_up_to_date(tmp_path):
    """Whatever JSON makes of them: a tuple comes back as a list."""
    made = []
    for _ in range(2):
        settings = {"units": (256, 16), "weights": {"domain": 1.0}}
        build_artifact(tmp_path / "gate", "gate", settings, {}, made.append, lambda line: None)
    assert len(made) == 1


READ = collections.deque(maxlen=1000)  # names of the files that were opened last to be read
sys.addaudithook(
    lambda event, given: (
        event == "open"
        and isinstance(given[0], str)
        and (given[1] or "r")[0] == "r"
        and READ.append(Path(given[0]).name)
    )
)


def test_sealing_reads_no_shard_again(tmp_path):
    """Writers leave the hash of what they wrote; those of a killed run are taken, too."""

    def killed(work):
        for n in range(3):
            save_array(shard_path(work, "a", n), WHOLE[n:])
        raise KeyboardInterrupt

    def make(work):
        write_atomic(work / "of_a_library", lambda p: p.write_bytes(b"some index"))
        save_array(shard_path(work, "a", 3), WHOLE)
        (work / "without").write_text("left no hash")

    with pytest.raises(KeyboardInterrupt):
        build_artifact(tmp_path / "x", "x", {}, {}, killed, lambda line: None)
    READ.clear()
    artifact = build_artifact(tmp_path / "x", "x", {}, {}, make, lambda line: None)
    read = set(READ)
    assert "without" in read and not {name for name in read if name.endswith((".npy", "library"))}
    names = [f"a-0000{n}.npy" for n in range(4)]
    assert list(artifact.manifest["files"]) == [*names, "of_a_library", "without"]
    for name, entry in artifact.manifest["files"].items():
        content = (artifact.path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert sorted(p.name for p in artifact.path.iterdir() if p.is_dir()) == []


def test_two_writers_of_one_shard(tmp_path):
    """A worker that was given up may still write: whichever came last is what is sealed."""

    def make(work):
        path = shard_path(work, "a", 0)
        save_array(path, WHOLE)
        save_array(path, WHOLE + 1)

    artifact = build_artifact(tmp_path / "x", "x", {}, {}, make, lambda line: None)
    assert artifact.manifest["files"]["a-00000.npy"]["sha256"] == file_sha256(
        artifact.path / "a-00000.npy"
    )


def test_a_shard_that_lost_bytes_before_it_is_sealed(tmp_path):
    """The sentence is followed: the shard is made again, the others are kept."""
    made = []

    def make(work, damage=True):
        for n in unfinished(work, ("a",), 3):
            save_array(shard_path(work, "a", n), WHOLE)
            made.append(n)
        path = shard_path(work, "a", 1)
        if damage:
            path.write_bytes(path.read_bytes()[:-9])

    with pytest.raises(MemdecError, match="a-00001.npy has 303 of the 312 bytes") as raised:
        build_artifact(tmp_path / "x", "x", {}, {}, make, lambda line: None)
    Path(re.search(r"delete (\S+)", str(raised.value))[1]).unlink()
    build_artifact(tmp_path / "x", "x", {}, {}, lambda w: make(w, False), lambda line: None)
    assert made == [0, 1, 2, 1]
