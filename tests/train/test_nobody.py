"""A container may run as a user whom no passwd entry names and who has no home."""

import subprocess

import pytest


def can_unshare() -> bool:
    return subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="needs user namespaces")
def test_a_user_without_a_name_or_a_home(pipeline, command, quick, hashes):
    """With a Ray of its own, which makes processes, and the same artifacts."""
    user = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    hidden = ("USER", "LOGNAME", "HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME")
    nameless = ["env", *(f"--unset={name}" for name in hidden), "HOME=/proc/nowhere"]
    made = command(pipeline.base, pipeline.corpus, quick())
    code, said = made.run(*user, *nameless, **{"ray-address": "local"})
    assert code == 0, said
    assert "Traceback" not in said and "rror" not in said, said
    assert hashes(made.output) == hashes(pipeline.output)
