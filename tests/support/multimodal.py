"""Tiny bases that see images, with their processors, real images, and the answer key.

Shapes: T tokens of one sequence, V base vocabulary.
"""

import base64
import functools
import io
import random
from dataclasses import dataclass

import safetensors.torch
import torch
from support.bases import BASES, TINY
from support.tiny_models import VOCAB, save_tokenizer

NEWLINES = ["\n" * count for count in range(1, 5)]  # vLLM looks for these around Gemma's images
GEMMA = ["<start_of_image>", "<end_of_image>", *NEWLINES, "<image_soft_token>"]
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# A message is a text, or parts of which some are images: MARK.
TEMPLATE = """{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}\
{{ m['content'] }}{% else %}{% for part in m['content'] %}{% if part['type'] == 'text' %}\
{{ part['text'] }}{% else %}MARK{% endif %}{% endfor %}{% endif %}
{% endfor %}"""
TEXT = {name: value for name, value in TINY.items() if name != "tie_word_embeddings"}
TEXT["vocab_size"] = VOCAB + 8  # with all of these


@dataclass(frozen=True)
class Base:
    """A tiny base that sees images."""

    folder: str
    mark: str  # an image in a prompt
    placeholder: int  # the token that stands for a part of one


def save_tokens(folder, special, mark, **names):
    """Save the tiny tokenizer, with the tokens of images behind the others; return it."""
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=names)
    assert tokenizer.convert_tokens_to_ids(special) == [*range(VOCAB, VOCAB + len(special))]
    tokenizer.chat_template = TEMPLATE.replace("MARK", mark)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_gemma3(folder):
    """Save a multimodal Gemma 3, whose images are 4 tokens each, of an id beyond its vocabulary."""
    import transformers

    boi, eoi, *_, soft = GEMMA
    tokenizer = save_tokens(folder, GEMMA, boi, boi_token=boi, eoi_token=eoi, image_token=soft)
    text = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"query_pre_attn_scalar": 32, "initializer_range": 0.1}
    text["vocab_size"] = VOCAB + len(GEMMA) - 1
    config = transformers.Gemma3Config(
        text_config=TEXT | text,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        boi_token_index=VOCAB,
        eoi_token_index=VOCAB + 1,
        image_token_index=text["vocab_size"],
        initializer_range=0.1,
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 64, "width": 64})
    transformers.Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # which starts as zeros
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    model.save_pretrained(folder)
    # As the released ones name them, and vLLM reads them.
    file = folder / "model.safetensors"
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    return Base(str(folder), boi, text["vocab_size"])


def save_qwen2_5_vl(folder):
    """Save a Qwen2.5-VL, which has M-RoPE: an image's tokens have positions of rows and columns."""
    import transformers

    start, end, image, _ = QWEN
    mark = f"{start}{image}{end}"
    tokenizer = save_tokens(folder, QWEN, mark)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
            "window_size": 56,
            "initializer_range": 0.3,
        },
        image_token_id=VOCAB + 2,
        video_token_id=VOCAB + 3,
        vision_start_token_id=VOCAB,
        vision_end_token_id=VOCAB + 1,
        initializer_range=0.3,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12}
    transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=size),
    ).save_pretrained(folder)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return Base(str(folder), mark, VOCAB + 2)


def save_qwen3_5(folder):
    """Save a multimodal Qwen3.5, which keeps a state besides; bfloat16, as CPUs compute that."""
    import transformers

    start, end, picture, _ = QWEN
    mark = f"{start}{picture}{end}"
    tokenizer = save_tokens(folder, QWEN, mark)
    config = BASES["Qwen3.5, multimodal"]()
    config.text_config.vocab_size = TEXT["vocab_size"]
    config.image_token_id, config.video_token_id = VOCAB + 2, VOCAB + 3
    config.vision_start_token_id, config.vision_end_token_id = VOCAB, VOCAB + 1
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 12}
    transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(size=size),
    ).save_pretrained(folder)
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return Base(str(folder), mark, VOCAB + 2)


SAVE = {"gemma3": save_gemma3, "qwen2_5_vl": save_qwen2_5_vl, "qwen3_5": save_qwen3_5}


def image(seed, width=84, height=56):
    """Return a picture of random pixels."""
    from PIL import Image

    pixels = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), pixels)


def url_of(picture):
    """Return a picture as the URL that a client sends: a PNG file in base64."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.cache
def load(base, dtype):
    """Return a base's model, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base.folder, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(base.folder)


@torch.no_grad()
def log_probs(base, ids, pictures=(), dtype=torch.float64):
    """Return log p(next | ids[:t+1], pictures) as float64 [T, V].

    ids: as served, a placeholder for each part of a picture. dtype: in which the base computes.
    """
    model, processor = load(base, dtype)
    inputs = {}
    if pictures:
        # The text is not used.
        both = processor(images=[[*pictures]], text=base.mark * len(pictures), return_tensors="pt")
        known = ("pixel_values", "image_grid_thw")
        inputs = {name: both[name] for name in known if name in both}
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    ids_1T = torch.tensor([ids])
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids_1T == base.placeholder).int()
    # Without types of tokens: then Gemma's image tokens see none after them, as in vLLM on a CPU.
    return model(ids_1T, **inputs).logits[0].double().log_softmax(-1)


def mixture(base, memory, alpha, ids, pictures=(), dtype=torch.float64):
    """Return log((1 - alpha) p_base + alpha p_memory) as float64 [T, V]; a memory has ids alone."""
    from support import oracle

    base_TV = log_probs(base, ids, pictures, dtype)
    memory_TV = oracle.log_probs(memory, ids, base_TV.shape[1])
    return ((1 - alpha) * base_TV.exp() + alpha * memory_TV.exp()).log()
