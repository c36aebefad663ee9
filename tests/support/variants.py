"""What is made of a model's folder: a copy with int8 weights, a LoRA adapter of random weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4
# vLLM: "FP8 KV cache on CPU requires x86 with AVX-512 or AMX."
AMX = torch.cpu._is_amx_tile_supported()
FP8 = torch.cpu._is_avx512_supported() or AMX
# vLLM's int8 kernel for AMX: "expect A to be bfloat16 or half."
INT8_DTYPE = "bfloat16" if AMX else "float32"


def matrices(tensors, parts):
    """Return the names of the matrices of a language model's layers that end in these parts."""
    names = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.ndim == 2]
    return [n for n in names if ".layers." in n and "vision" not in n and n.endswith(parts)]


def quantised(folder, target, parts=("proj",)):
    """Write a copy with int8 weights, one scale a row: W8A8 of compressed-tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    chosen = matrices(tensors, parts)
    for name in chosen:
        weight = tensors[f"{name}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{name}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    others = [n for n in matrices(tensors, ("",)) if n not in chosen and not n.endswith("scale")]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head", *others],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights | {"dynamic": False},
                "input_activations": activations | {"dynamic": True},
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def adapter(base, target, parts=("q_proj", "down_proj")):
    """Write a LoRA adapter of these parts of a base, in PEFT's format."""
    target.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    tensors, written = load_file(Path(base) / "model.safetensors"), {}
    for name in matrices(tensors, parts):
        out, into = tensors[f"{name}.weight"].shape
        written[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into) * 0.2
        written[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK) * 0.2
    save_file(written, target / "adapter_model.safetensors")
    names = sorted({name.split(".")[-3] for name in written})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    settings |= {"target_modules": names, "task_type": "CAUSAL_LM"}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return str(target)


def merged(base, adapter, target):
    """Write a copy of a base with an adapter added to its weights."""
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    added = load_file(Path(adapter) / "adapter_model.safetensors")
    for name in tensors:
        low = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{low}A.weight" in added:
            tensors[name] += added[f"{low}B.weight"] @ added[f"{low}A.weight"]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)
