"""Models in Mistral's own format: tekken.json, params.json and consolidated weights."""

import importlib.resources
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Names of tensors, Hugging Face's and Mistral's.
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers": "layers",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}


def save_tekken(folder: str | Path, size: int, special: int = 100) -> Path:
    """Write the first tokens of Mistral's own tekken.json, so many with the special ones."""
    source = importlib.resources.files("mistral_common") / "data/tekken_240911.json"
    content = json.loads(source.read_text())
    content["vocab"] = content["vocab"][: size - special]
    content["config"] |= {
        "num_vocab_tokens": size - special,
        "default_vocab_size": size,
        "default_num_special_tokens": special,
    }
    path = Path(folder) / "tekken.json"
    path.write_text(json.dumps(content))
    return path


def save_consolidated(model: str | Path, folder: Path) -> None:
    """Write a Mistral model of Hugging Face's format in Mistral's: weights and params.json."""
    config = json.loads((Path(model) / "config.json").read_text())
    params = {name: config[theirs] for name, theirs in PARAMS.items()}
    params |= {"rope_theta": config["rope_parameters"]["rope_theta"], "model_type": "transformer"}
    (folder / "params.json").write_text(json.dumps(params))
    weights = {}
    for name, weight in load_file(Path(model) / "model.safetensors").items():
        for hugging_face, mistral in NAMES.items():
            name = name.replace(hugging_face, mistral)
        if ".wq." in name or ".wk." in name:  # Mistral's rotary pairs are neighbours
            rows, columns = weight.shape
            halves = weight.view(rows // config["head_dim"], 2, config["head_dim"] // 2, columns)
            weight = halves.transpose(1, 2).reshape(rows, columns)
        weights[name] = weight.contiguous().to(torch.float32)
    save_file(weights, folder / "consolidated.safetensors", metadata={"format": "pt"})
