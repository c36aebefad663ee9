"""Arrays in shards: reading is that of the whole array, and a damaged file is named."""

import numpy as np
import pytest

from vllm_memdec.train.artifacts import build_artifact
from vllm_memdec.train.shards import Sharded, load_shard, save_array, shard_path, shards

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

    found = build_artifact(tmp_path / "memory", "memory", {}, {}, make, lambda line: None)
    assert list(found.manifest["files"]) == ["whole"]
    assert not list(found.path.rglob("*.tmp"))


def test_the_same_settings_are_up_to_date(tmp_path):
    """Whatever JSON makes of them: a tuple comes back as a list."""
    made = []
    for _ in range(2):
        settings = {"units": (256, 16), "weights": {"domain": 1.0}}
        build_artifact(tmp_path / "gate", "gate", settings, {}, made.append, lambda line: None)
    assert len(made) == 1
