"""Pack vLLM for a GPU machine that has torch 2.11 (CUDA 13.0) and no network.

    make gpu-pack                                             # into build/gpu-pack
    python -m benchmarks.gpu.pack OUT [--vllm-wheel FILE] [--untrimmed]

Writes OUT/piece1, OUT/piece2: archives of at most 60 MiB together each. The first has all that
dense models need: vLLM's Python with the packages of wheels.txt, its compiled operators and
FlashAttention 3; the second has the operators of mixtures of experts. unpack.sh, which gpu.py
calls, puts them into one folder there. Needs pip with a package registry, and ten minutes.

What is left out: vLLM's code for other GPUs than sm_90 (H100, H200) inside the compiled modules,
FlashAttention 2, FlashMLA, DeepGEMM and FP4 kernels. --untrimmed keeps other GPUs' code: three
pieces, should a driver refuse the shortened modules.
"""

import argparse
import hashlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
VLLM = "vllm==0.32.0"
LIMIT = 60 << 20  # bytes of a piece
LEFT_OUT = (
    "vllm/vllm-rs", "vllm/third_party/deep_gemm/*", "vllm/third_party/fmha_sm100/*", "*/static/*",
    "*/_vllm_fa2_C*", "*/_flashmla*", "*/_flashkda*", "*/_deepselect*", "*/_qutlass*", "*/RECORD",
)  # fmt: skip
COMPILED = {  # archive -> the module it holds; all else goes into the archive "python"
    "kernels": "vllm/_C_stable_libtorch.abi3.so",
    "attention": "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "moe": "vllm/_moe_C_stable_libtorch.abi3.so",
}
PIP_TARGET = [
    "--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp",
    *(word for p in ("manylinux_2_34", "manylinux_2_31", "manylinux_2_28", "manylinux_2_27",
                     "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
      for word in ("--platform", f"{p}_x86_64")),
]  # fmt: skip
CONTAINER, CUBIN, PTX, SM = 0xBA55ED50, 2, 1, 90


def fat_binaries(module: bytes) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the sections of an ELF file that hold GPU code."""
    table = struct.unpack_from("<Q", module, 0x28)[0]
    count, names = struct.unpack_from("<2xHH", module, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", module, table + 64 * i) for i in range(count)]
    for header in headers:
        name = headers[names][4] + header[0]
        if module[name : module.index(b"\0", name)] == b".nv_fatbin":
            yield header[4], header[5]


def trim(module: bytearray) -> int:
    """Drop GPU code that sm_90 cannot use, in place; return how many entries were dropped.

    A container is a header (magic, version, header's length, length of what follows) and entries
    (kind, version, header's length, length of the code, ...; the architecture at byte 28). Machine
    code of sm_90 is kept, PTX only where there is none. What is kept moves to the front, the rest
    is zeros: the file keeps its layout and packs well.
    """
    dropped = 0
    for start, size in fat_binaries(module):
        at = start
        while at <= start + size - 16:
            magic, _, header, length = struct.unpack_from("<IHHQ", module, at)
            if magic != CONTAINER:
                at += 8
                continue
            body, end = at + header, at + header + length
            entries, place = [], body
            while place < end:
                kind, _, head, code = struct.unpack_from("<HHIQ", module, place)
                sm = struct.unpack_from("<I", module, place + 28)[0]
                entries.append((kind, sm, bytes(module[place : place + head + code])))
                place += head + code
            if place != end:
                raise ValueError("GPU code is packed in an unknown way: use --untrimmed.")
            kept = [code for kind, sm, code in entries if (kind, sm) == (CUBIN, SM)]
            kept = kept or [code for kind, sm, code in entries if kind == PTX and sm <= SM]
            if kept:
                joined = b"".join(kept)
                module[body:end] = joined + bytes(length - len(joined))
                struct.pack_into("<Q", module, at + 8, len(joined))
                dropped += len(entries) - len(kept)
            at = end
    return dropped


def archive(folder: Path, path: Path) -> Path:
    """Pack a folder's content, the same bytes for the same files."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(path, "w:xz", preset=6) as packed:
        for child in sorted(folder.iterdir()):
            packed.add(child, child.name, filter=plain)
    return path


def pip(*arguments: str) -> None:
    """Run pip for the GPU machine's Python."""
    subprocess.run([sys.executable, "-m", "pip", *arguments, *PIP_TARGET, "-q"], check=True)


def collect(work: Path, wheel: Path | None, trimmed: bool) -> dict[str, Path]:
    """Return the folders to pack by archive."""
    if wheel is None:
        pip("download", VLLM, "-d", str(work / "wheel"))
        [wheel] = (work / "wheel").glob("*.whl")
    parts = {name: work / name for name in (*COMPILED, "python")}
    place = {module: parts[name] for name, module in COMPILED.items()}
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if not any(fnmatch(name, pattern) for pattern in LEFT_OUT):
                files.extract(name, place.get(name, parts["python"]))
    for module, folder in place.items():
        if trimmed:
            content = bytearray((folder / module).read_bytes())
            print(f"{module}: {trim(content)} pieces of GPU code dropped", flush=True)
            (folder / module).write_bytes(content)
    target = ["--target", str(parts["python"]), "--no-compile", "--root-user-action=ignore"]
    pip("install", "-r", str(HERE / "wheels.txt"), *target)
    shutil.rmtree(parts["python"] / "bin", ignore_errors=True)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--vllm-wheel", type=Path, help="one that is here already")
    parser.add_argument("--untrimmed", action="store_true", help="keep other GPUs' code")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("piece*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        work = Path(folder)
        parts = collect(work, arguments.vllm_wheel, not arguments.untrimmed)
        names = ["kernels", "attention", "python", "moe"]
        with ProcessPoolExecutor(2) as pool:
            paths = [work / f"{name}.tar.xz" for name in names]
            packed = list(pool.map(archive, [parts[name] for name in names], paths))
        pieces: list[int] = []  # bytes
        for path in packed:
            size = path.stat().st_size
            if size > LIMIT:
                raise ValueError(f"{path.name} has {size} bytes, more than a piece.")
            fits = (n for n, used in enumerate(pieces) if used + size <= LIMIT)
            number = next(fits, len(pieces))
            if number == len(pieces):
                pieces.append(0)
            pieces[number] += size
            piece = arguments.out / f"piece{number + 1}"
            piece.mkdir(exist_ok=True)
            moved = shutil.move(path, piece / path.name)
            digest = hashlib.sha256(Path(moved).read_bytes()).hexdigest()
            with open(piece / "SHA256", "a") as sums:
                sums.write(f"{digest}  {path.name}\n")
            print(f"piece{number + 1}/{path.name}: {size} bytes", flush=True)


if __name__ == "__main__":
    main()
