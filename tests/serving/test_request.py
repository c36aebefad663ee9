"""What requests may ask for, and what it resolves to."""

import pytest

from vllm_memdec.config import NONE
from vllm_memdec.request import (
    ALPHA,
    MEMORY,
    Choices,
    check_extra_args,
    check_images,
)
from vllm_memdec.request_body import check_body

CHOICES = Choices({"law": 0.6, "bio": 0.4}, "law")


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf"), "0.3", True, None, [0.3]])
def test_bad_weights_are_refused(value):
    with pytest.raises(ValueError, match="memdec_alpha must be a number between 0 and 1"):
        check_extra_args({"memdec_alpha": value}, CHOICES)


@pytest.mark.parametrize("value", ["tax", "", "LAW", 0, None, ["law"], True])
def test_bad_memories_are_refused(value):
    sentence = r"memdec_memory must be one of \['law', 'bio', 'none'\]"
    with pytest.raises(ValueError, match=sentence):
        check_extra_args({"memdec_memory": value}, CHOICES)


def test_other_arguments():
    check_extra_args(None, CHOICES)
    check_extra_args({"other": "x", "memdec_alpha": 1, "memdec_memory": "none"}, CHOICES)
    check_extra_args({"other": "x"}, None)
    with pytest.raises(ValueError, match="Unknown extra argument 'memdec_apha'"):
        check_extra_args({"memdec_apha": 0.3}, CHOICES)
    for key, value in (("memdec_alpha", 0.3), ("memdec_memory", "none")):
        with pytest.raises(ValueError, match="runs without a memory"):
            check_extra_args({key: value}, None)


@pytest.mark.parametrize(
    "extra_args",
    [
        {"alpha": 0},
        {"memory": "none"},
        {"memdec-alpha": 0},
        {"MEMDEC_ALPHA": 0},
        {"memdecMemory": "none"},
        {"memdc_memory": "none"},
        {"vllm_xargs": {"memdec_alpha": 0}},
        {"extra_args": {"alpha": 0}},
        {"memdec": {"weight": 0}},
        {"other": {"inner": {"memdec_alpha": 0}}},
        {"memory_alpha": 0},
        {"alpha_memory": 0},
        {"memory_weight": 0},
        {"mem-alpha": 0},
        {"memory_decoder_alpha": 0},
    ],
)
def test_near_misses_are_refused(extra_args):
    """In Python's extra_args, too: none of these gets the default weight."""
    with pytest.raises(ValueError, match="'memdec_alpha' (and|or) 'memdec_memory'"):
        check_extra_args(extra_args, CHOICES)


def nested(depth, innermost):
    for _ in range(depth):
        innermost = {"inner": innermost}
    return innermost


@pytest.mark.parametrize("field", ["vllm_xargs", "extra_body"])
def test_a_body_may_nest_deeper_than_python_calls(field):
    fields = ("prompt", "vllm_xargs")
    check_body({"prompt": "x", field: nested(5000, 1)}, fields, False, CHOICES, ())
    with pytest.raises(ValueError, match="'memdec_alpha' (and|or) 'memdec_memory'"):
        body = {"prompt": "x", field: nested(5000, {"memdec_alpha": 0})}
        check_body(body, fields, False, CHOICES, ())


def test_what_a_user_names_memory_is_the_user_s():
    """Schemas, labels, a template's arguments and fields of others hold any names."""
    names = {"memory": {"type": "string"}, "alpha": {}, "memdec_note": {}}
    schema = {"type": "object", "properties": names}
    body = {
        "messages": [{"role": "user", "content": "memdec_alpha"}],
        "metadata": {"memory": "x"},
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "structured_outputs": {"json": schema},
        "chat_template_kwargs": {"memory": True},
    }
    check_body(body, (*body, "vllm_xargs"), False, CHOICES, ())
    check_body(body | {"of_a_gateway": {"memory": 1}}, (*body, "vllm_xargs"), False, CHOICES, ())
    params = {"structured_outputs": {"json": schema}, "extra_args": {"memdec_alpha": 0.5}}
    generate = {"token_ids": [5], "sampling_params": params}
    check_body(generate, (*generate,), False, CHOICES, ())
    params["alpha"] = 0
    with pytest.raises(ValueError, match="put it into sampling_params.extra_args"):
        check_body(generate, (*generate,), False, CHOICES, ())


def test_arguments_of_others():
    """Another plugin's are let through, and plain names are its own where there is no memory."""
    others = {"session_id": "a", "alphabet": 1, "memory_limit": 2, "nested": {"alphas": [0.1]}}
    others |= {"cache": {"memory": "host", "alpha": 2}}
    check_extra_args(others, CHOICES)
    check_extra_args({"alpha": 0, "memory": "x", "nested": {"alpha": 0}}, None)


@pytest.mark.parametrize(
    ("extra_args", "names", "choice"),
    [
        (None, ["law"], ((0, 0.6),)),
        ({"other": 1}, ["law"], ((0, 0.6),)),
        ({"memdec_alpha": 0.2}, ["law"], ((0, 0.2),)),
        ({"memdec_memory": "bio"}, ["bio"], ((1, 0.4),)),
        ({"memdec_memory": "bio", "memdec_alpha": 1}, ["bio"], ((1, 1.0),)),
        ({"memdec_memory": "none"}, [], ()),
        ({"memdec_memory": "none", "memdec_alpha": 0.5}, [], ()),
        ({"memdec_memory": "bio", "memdec_alpha": 0}, [], ()),
        ({"memdec_memory": "off"}, [], ()),
        ({"memdec_memory": "off", "memdec_alpha": 0.1}, ["off"], ((2, 0.1),)),
    ],
)
def test_choice(extra_args, names, choice):
    """What the front end calls it for the cache and what the worker runs agree."""
    choices = Choices({"law": 0.6, "bio": 0.4, "off": 0.0}, "law")
    assert choices.running(extra_args) == names
    assert choices.resolve(extra_args) == choice


@pytest.mark.parametrize(
    ("extra_args", "choice"),
    [
        (None, ((0, -1.0),)),
        ({"memdec_alpha": "auto"}, ((0, -1.0),)),
        ({"memdec_alpha": 0.3}, ((0, -0.3),)),
        ({"memdec_alpha": 0}, ()),
        ({"memdec_memory": "capped"}, ((1, -0.5),)),
        ({"memdec_memory": "capped", "memdec_alpha": "auto"}, ((1, -1.0),)),
        ({"memdec_memory": "fixed"}, ((2, 0.4),)),
        ({"memdec_memory": "none", "memdec_alpha": "auto"}, ()),
    ],
)
def test_choice_with_gates(extra_args, choice):
    """What a memory with a gate is asked for is the most that the gate may give."""
    choices = Choices({"law": "auto", "capped": 0.5, "fixed": 0.4}, "law", {"law", "capped"})
    check_extra_args(extra_args, choices)
    assert choices.resolve(extra_args) == choice
    with pytest.raises(ValueError, match="or alpha_by_context, which the memory 'fixed' has not"):
        check_extra_args({"memdec_memory": "fixed", "memdec_alpha": "auto"}, choices)
    with pytest.raises(ValueError, match="memdec_alpha must be"):
        check_extra_args({"memdec_alpha": "Auto"}, choices)


def test_a_model_s_name():
    """What it asks for is what vllm_xargs would; a weight of the request's own goes before."""
    law, cautious = {MEMORY: "law"}, {MEMORY: "law", ALPHA: 0.2}
    served = {"law": law, "law-cautious": cautious, "bare": {MEMORY: NONE}}
    choices = Choices({"law": 0.6, "bio": 0.4}, "none", served=served)
    assert choices.asked("law", None) == law
    assert choices.asked("law-cautious", {"x": 1}) == cautious | {"x": 1}
    assert choices.asked("law-cautious", {ALPHA: 1, MEMORY: "law"}) == law | {ALPHA: 1}
    assert choices.asked("bare", {}) == {MEMORY: NONE}
    for other in ("tiny", None, 3, ["law"]):
        assert choices.asked(other, {MEMORY: "bio"}) == {MEMORY: "bio"}
    for name, what in (("law", "the memory 'law'"), ("bare", "the base alone")):
        with pytest.raises(ValueError, match=f"{name!r} is {what}, but memdec_memory is 'bio'"):
            choices.asked(name, {MEMORY: "bio"})
    for alpha in (0.5, "auto", "alone"):
        with pytest.raises(ValueError, match="'bare' is the base alone, but memdec_alpha is"):
            choices.asked("bare", {ALPHA: alpha})
    assert choices.asked("bare", {ALPHA: 0}) == {MEMORY: NONE, ALPHA: 0}
    check_body({"model": "law", "vllm_xargs": {ALPHA: 0.3}}, ("vllm_xargs",), False, choices, ())
    with pytest.raises(ValueError, match="memdec_alpha needs memdec_memory here"):
        check_body({"model": "x", "vllm_xargs": {ALPHA: 0.3}}, ("vllm_xargs",), False, choices, ())


def test_default_none():
    assert Choices({"law": 0.6}, "none").resolve(None) == ()


def test_requests_with_images():
    """A memory that is off for them: what asks for it by name or weight is refused."""
    choices = Choices({"law": 0.6, "bio": 0.4}, "law", without_images=["law"])
    images = ["an image"]
    assert choices.resolve(None) == choices.resolve(None, []) == ((0, 0.6),)
    assert choices.resolve(None, images) == () and choices.running(None, images) == []
    assert choices.resolve({MEMORY: "bio"}, images) == ((1, 0.4),)
    for fine in (None, {ALPHA: 0}, {MEMORY: NONE}, {MEMORY: "bio", ALPHA: 0.2}):
        check_images(fine, choices)
    for asked in ({ALPHA: 0.3}, {MEMORY: "law"}):
        with pytest.raises(ValueError, match=f"leave {[*asked][0]} out, or ask for the memory"):
            check_images(asked, choices)


@pytest.mark.parametrize("alpha", [0.6, 1, "auto"])
def test_a_weight_without_a_memory(alpha):
    """Where the default is "none" it would be dropped, and the base alone would answer."""
    choices = Choices({"law": 0.6}, "none", gated=("law",))
    with pytest.raises(ValueError, match="memdec_alpha needs memdec_memory here"):
        check_extra_args({"memdec_alpha": alpha}, choices)
    check_extra_args({"memdec_alpha": alpha, "memdec_memory": "law"}, choices)
    check_extra_args({"memdec_alpha": 0}, choices)


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        (None, "memory 'law', alpha 0.6"),
        ({"memdec_alpha": 0}, "no memory"),
        ({"memdec_memory": "none"}, "no memory"),
        ({"memdec_memory": "gated"}, "memory 'gated', alpha 'auto'"),
        (
            {"memdec_memory": "gated", "memdec_alpha": 0.4},
            "memory 'gated', alpha 'auto', at most 0.4",
        ),
        ({"memdec_memory": "steps"}, "memory 'steps', alpha 'auto'"),
        ({"memdec_memory": "steps", "memdec_alpha": 1}, "memory 'steps', alpha 1.0"),
    ],
)
def test_words_for_a_log(extra_args, words):
    alphas = {"law": 0.6, "gated": "auto", "steps": "auto"}
    choices = Choices(alphas, "law", gated=("gated",), by_context=("steps",))
    assert choices.described(extra_args) == words
