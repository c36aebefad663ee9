"""Tiny texts, tokenizers and models that are random but always the same."""

import random
import shutil

VOCAB = 1000  # tokens of the tiny tokenizer


def tiny_text(seed: int = 0, words: int = 4000) -> str:
    """Return deterministic pseudo-language: random words of two-letter syllables."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(800)]
    return " ".join(rng.choices(lexicon, k=words))


def save_tokenizer(folder, seed: int = 0) -> None:
    """Train a byte-level BPE of VOCAB tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text(seed)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    assert len(fast) == VOCAB


def save_chat_model(model, folder, template) -> str:
    """Copy a model of VOCAB + 2 rows, its tokenizer one with ChatML's control tokens."""
    from transformers import AutoTokenizer

    shutil.copytree(model, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_config(
    kind: str, vocab: int, hidden: int, layers: int, positions: int, spread: float = 0.3
):
    """Return a config whose heads (size 32) the CPU attention supports.

    spread: of the weights. A wide one makes answers differ; with 0.3 plain float32 is up to 4e-4
    from float64 after hundreds of tokens, with 0.15 up to 4e-5.
    """
    import transformers

    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab,
            n_embd=hidden,
            n_layer=layers,
            n_head=hidden // 32,
            n_positions=positions,
            initializer_range=spread,
            bos_token_id=0,
            eos_token_id=1,
        )
    name = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "qwen3_moe": "Qwen3MoeConfig",
    }[kind]
    own = {
        "mistral": {"sliding_window": 32},
        "qwen3_moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden,
            "norm_topk_prob": True,
        },
    }.get(kind, {})
    return getattr(transformers, name)(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=positions,
        initializer_range=spread,
        tie_word_embeddings=kind == "qwen2",
        bos_token_id=0,
        eos_token_id=1,
        **own,
    )


def add_bos(folder) -> None:
    """Make a Llama folder one whose tokenizer puts BOS before every text, and that needs it.

    As Gemma does: whoever reads BOS answers evenly, the others as a random model does.
    """
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    attention = model.model.layers[0].self_attn
    embedding_VD, head_VD = model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        alone_D = embedding_VD[0] / embedding_VD[0].norm()
        embedding_VD[1:] -= (embedding_VD[1:] @ alone_D)[:, None] * alone_D
        value = torch.ones(32)
        attention.v_proj.weight += 300 * torch.outer(value, alone_D)
        for part_Dh in attention.o_proj.weight.split(32, dim=1):
            unheard_D = part_Dh @ value
            unheard_D /= unheard_D.norm()
            head_VD -= (head_VD @ unheard_D)[:, None] * unheard_D
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(folder)
