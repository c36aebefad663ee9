"""What a unit of work costs: measured by probes.py, or by the figures of a GPU."""

from dataclasses import dataclass, replace

import torch

from vllm_memdec.train.model.huggingface import load_config, skeleton, text_config
from vllm_memdec.train.model.kinds import share_of_experts
from vllm_memdec.train.stages.index import KMEANS_PASSES


@dataclass(frozen=True)
class Rates:
    """Seconds that one worker needs, and sizes seen on the sample."""

    prepare: float  # the command's own reading of tokenizer and configs
    start: float  # the start of the cluster
    first: float  # the start of its first process, which imports what stages do
    map: float  # the start of a stage's workers
    call: float  # the start of one process
    train: float  # the start of the training's processes
    tokenise: float  # a token
    load: float  # the base, in a process that has loaded no model
    reload: float  # the base, in one that has
    key: float  # a row, the base up to the key
    train_index: float  # a key of the sample and list, all passes of k-means
    codes: float  # a key that codes are trained on
    compare: float  # a key and list
    encode: float  # a key, beside finding its list
    scan: float  # a key visited by a query
    imbalance: float  # keys visited, as a multiple of those in lists of equal length
    merge: float  # a neighbour of a row, for each part of the index but the first
    aggregate: float  # a neighbour of a row, summed into its target
    fit: float  # the fit of the temperature
    build_memory: float  # the memory before training
    step: float  # a row of training, over all of the vocabulary
    sampled_step: float  # a row of training, with memory.sampled_negatives
    launch: float  # a forward and backward pass, at least: a GPU waits for its commands
    reduce: float  # a byte of the gradients, summed over workers
    checkpoint: float  # one checkpoint, written
    hash: float  # a byte
    write: float  # a byte
    read: float  # a byte that the system does not hold in RAM
    score_base: float  # a row of text scored by the base
    score_memory: float  # a row of text scored by the memory
    tokens_per_byte: float
    rows_per_token: float
    entries: float  # tokens of a target, on average
    width: int  # numbers of a key
    vocabulary: int  # tokens of the tokenizer
    threads: int  # threads of a worker on CPUs
    used: int  # tokens of the vocabulary that occur in the sample
    sample_tokens: int  # tokens of the sample
    memory_parameters: int  # weights of the memory
    process_bytes: int  # peak RAM of a process that has loaded no model
    embed_bytes: int  # peak RAM of a process that embeds
    train_bytes: int  # peak RAM of a process that trains


@dataclass(frozen=True)
class Gpu:
    """Published figures: dense bf16 and float32 FLOP/s, bytes/s of memory and to another GPU."""

    flops: float
    float32: float
    bandwidth: float
    link: float
    memory: float  # bytes of the GPU's own memory


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 2.04e12, 300e9, 80e9),
    "a800": Gpu(312e12, 19.5e12, 2.04e12, 200e9, 80e9),
    "h100": Gpu(989e12, 67e12, 3.35e12, 450e9, 80e9),
    "h200": Gpu(989e12, 67e12, 4.8e12, 450e9, 141e9),
    "l4": Gpu(121e12, 30e12, 0.3e12, 32e9, 24e9),
    "l40s": Gpu(362e12, 91e12, 0.864e12, 32e9, 48e9),
}
UTILISATION = 0.35  # share of a GPU's published figures that work is assumed to reach
MEMORY_LAYERS = 24  # layers of a memory where settings do not tell: those of a 0.5B model
LAUNCH = 3 * 0.6e-3  # seconds of a layer's forward and backward pass: see devices.py


def on_gpu(
    rates: Rates, gpu: Gpu, base_parameters: int, key_bytes: int, layers: int = MEMORY_LAYERS
) -> Rates:
    """Return rates for a GPU, from its figures; what runs on CPUs keeps those measured.

    key_bytes: of a key in the index, all of which a search reads of each that it visits; layers: of
    the memory.
    """
    flop, byte = 1 / (gpu.flops * UTILISATION), 1 / (gpu.bandwidth * UTILISATION)
    flop32 = 1 / (gpu.float32 * UTILISATION)  # faiss compares keys with lists in float32
    memory = rates.memory_parameters
    return replace(
        rates,
        key=2 * base_parameters * flop,
        score_base=2 * base_parameters * flop,
        score_memory=2 * memory * flop,
        step=6 * memory * flop,
        sampled_step=6 * memory * flop,
        train_index=KMEANS_PASSES * 2 * rates.width * flop32,
        compare=2 * rates.width * flop32,
        encode=2 * rates.width * byte,
        scan=key_bytes * byte,
        launch=LAUNCH * layers,
        reduce=1 / (gpu.link * UTILISATION),
    )


def base_parameters(base: str) -> int:
    """Return how many weights a token of text goes through in a model, from its config alone."""
    config = load_config(base)
    text, model = text_config(config), skeleton(config)
    if text is not config:  # not what sees or hears
        model = torch.nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])
    experts = {
        parameter
        for name, module in model.named_modules()
        if name.endswith(".experts") or "Experts" in type(module).__name__
        for parameter in module.parameters()
    }
    every, some = (sum(p.numel() for p in each) for each in (model.parameters(), experts))
    return every - round(some * (1 - share_of_experts(text)))
