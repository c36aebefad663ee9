"""Build the stand-in device for the torch and vLLM of this Python: `python build.py FOLDER`.

It needs gcc and nm. CUDA's headers come with the wheels that torch and Triton bring.
"""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SITE = Path(sysconfig.get_paths()["purelib"])
NEEDED = re.compile(r"(?:__)?(?:cuda|cublas|cu[A-Z])\w+")  # symbols of the runtime, cuBLAS, driver
# What is linked against the runtime, vLLM's operators too. Triton compiles its launcher later.
HEADERS = ("nvidia/cu13/include", "triton/backends/nvidia/include")
LIBRARIES = ("torch/lib/lib*.so", "vllm/*.so", "vllm/vllm_flash_attn/*.so")


def rest_of_cuda(source: str) -> str:
    """Return C of a function that returns 0 for each symbol that is needed and not in `source`."""
    files = [str(file) for pattern in LIBRARIES for file in sorted(SITE.glob(pattern))]
    nm = ["nm", "--dynamic", "--undefined-only", "--just-symbols", *files]
    lines = subprocess.run(nm, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {line.split("@")[0] for line in lines}
    names |= set(NEEDED.findall((SITE / "triton/backends/nvidia/driver.c").read_text()))
    needed = {name for name in names if NEEDED.fullmatch(name) and not name.startswith("cuFile")}
    written = set(NEEDED.findall(source))
    return "\n".join(f"long {name}(void) {{ return 0; }}" for name in sorted(needed - written))


def build(folder: Path) -> None:
    """Write libcuda.so.1, which is to be preloaded, and libnvidia-ml.so.1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rest.c").write_text(rest_of_cuda((HERE / "device.c").read_text()))
    headers = [f"-I{SITE / folder}" for folder in HEADERS]
    device = [*headers, str(HERE / "device.c"), str(folder / "rest.c")]
    for name, sources in (
        ("libcuda.so.1", device),
        ("libnvidia-ml.so.1", [str(HERE / "nvml.c")]),
    ):
        # rest.c declares what the compiler knows otherwise: no warnings (-w).
        gcc = ["gcc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        subprocess.run([*gcc, "-o", str(folder / name), *sources, "-ldl", "-lpthread"], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
