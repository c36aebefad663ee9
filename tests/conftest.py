"""Shared by all tests: environment before any heavy import, seeds, the gpu marker, tiny models."""

import os
import random
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Tiny tensors: a second thread only waits, and after a fork OpenMP has no other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from support.tiny_models import VOCAB, add_bos, save_tokenizer, tiny_config

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when a kernel is defined


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process gets a file of tests at a time; two files share a server, which starts slowly."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return super()._split_scope(nodeid).replace("test_soak.py", "test_http.py")

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return a factory of random model folders: tiny_model(kind, seed=..., vocab=..., ...)."""
    from transformers import AutoModelForCausalLM

    made = {}

    def make(
        kind, seed=0, vocab=VOCAB, hidden=64, layers=2, positions=256, tokenizer=0, spread=0.3
    ):
        key = (kind, seed, vocab, hidden, layers, positions, tokenizer, spread)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(seed)
            config = tiny_config(kind, vocab, hidden, layers, positions, spread)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            save_tokenizer(folder, tokenizer)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def bos_model(tiny_model, tmp_path_factory):
    """Return the folder of tiny_model("llama"), its tokenizer one that adds BOS to every text."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp("bos") / "bos-base")
    add_bos(folder)
    return str(folder)
