"""Weights of several memories as requests give them: what is taken, what is refused, and how."""

import pytest
from support import several

from vllm_memdec.config import AUTO, MemDecConfig
from vllm_memdec.memory_weights import as_text, read_weights
from vllm_memdec.request import ALPHA, MEMORY, Choices, check_extra_args, check_images
from vllm_memdec.request_body import check_body, write_weights

NAMES = {"law": "auto", "bio": 0.7, "tax": 0.5}
TWO = Choices(NAMES, "law", {"law", "bio"}, at_once=2)
THREE = Choices(NAMES, "bio", {"law", "bio"}, at_once=3, without_images=["bio"])


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        ({"law": 0.3, "bio": 0.4}, ((1, 0.4), (0, 0.3))),
        ("bio:0.4, law:0.3", ((1, 0.4), (0, 0.3))),
        ({"tax": 0.5, "law": 0.5}, ((0, 0.5), (2, 0.5))),  # of equals the server's first
        ({"law": 0.3}, ((0, 0.3),)),  # no gate, no cap
        ({"law": 1}, ((0, 1.0),)),
        ({"law": 0.3, "bio": 0, "tax": 0.0}, ((0, 0.3),)),
        ({"law": 0}, ()),
        ({"law": 0.7, "bio": 0.1 + 0.2}, ((0, 0.7), (1, 0.1 + 0.2))),
        (AUTO, ((0, -1.0), (1, -0.7))),
    ],
)
def test_what_runs(asked, runs):
    check_extra_args({MEMORY: asked}, TWO)
    assert TWO.resolve({MEMORY: asked}) == runs
    numbers, weights = TWO.placed({MEMORY: asked})
    assert len(numbers) == len(weights) == 2
    assert (*zip(numbers, weights, strict=True),)[: len(runs)] == runs
    if isinstance(asked, dict):
        assert read_weights(as_text(asked)) == asked


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "names no memory: give weights as in 'law:0.3,bio:0.2'"),
        ({"wine": 0.3}, r"'wine', which is none of this server's .*: name one of \['law', 'bio'"),
        ({3: 0.3}, "3, which is none of"),
        ({"none": 0.3}, "'none', which is none of"),
        ({"law": -0.1, "bio": 0.3}, "the weight of 'law' must be a number between 0 and 1"),
        ({"law": float("nan")}, "the weight of 'law' must be"),
        ({"law": True}, "the weight of 'law' must be"),
        ({"law": None}, "the weight of 'law' must be"),
        ({"law": "0.3"}, "the weight of 'law' must be"),
        ({"law": AUTO}, "the weight of 'law' must be"),
        ({"law": 1.1}, "the weight of 'law' must be"),
        ({"law": 0.6, "bio": 0.5}, "the weights make 1.1, more than 1: lower them"),
        ({"law": 0.6, "bio": 0.40001}, "the weights make 1.00001, more"),
        ({"law": 0.1, "bio": 0.1, "tax": 0.1}, 'mixes 3 .* at most 2: .* with "at_once": 3'),
        ("law:0.3,bio", "'bio' within 'law:0.3,bio' is no memory with its weight"),
        ("law:0.3,law:0.4", "'law:0.4' within .* a second one of it"),
        ("law:x", "is no memory with its weight"),
        ("law:nan", "the weight of 'law' must be"),
        (":0.3", "'', which is none of"),
        ("wine", r"must be one of \['law', 'bio', 'tax', 'none'\], .* or weights as in"),
    ],
)
def test_what_is_refused(asked, sentence):
    with pytest.raises(ValueError, match=f"{sentence}.*[.]$"):
        check_extra_args({MEMORY: asked}, TWO)


def test_a_weight_beside_weights():
    """Whose it would be is not said; 0 beside all gates is the base alone, as beside a memory."""
    for alpha in (0, 0.3, AUTO, "alone"):
        with pytest.raises(ValueError, match=f"{MEMORY} has weights of its own: leave {ALPHA} out"):
            check_extra_args({MEMORY: {"law": 0.3}, ALPHA: alpha}, TWO)
    defaults = Choices(NAMES, AUTO, {"law", "bio"}, at_once=2)
    for given, choices in (({MEMORY: AUTO}, TWO), ({}, defaults)):
        for alpha in (0.3, "alone"):
            with pytest.raises(ValueError, match="'auto' is several, weighed by their gates"):
                check_extra_args(given | {ALPHA: alpha}, choices)
        check_extra_args(given | {ALPHA: 0}, choices)
        assert choices.resolve(given | {ALPHA: 0}) == ()
        check_extra_args(given | {ALPHA: AUTO}, choices)
        assert choices.resolve(given | {ALPHA: AUTO}) == ((0, -1.0), (1, -1.0))


def test_all_gates_together():
    """The default's memory drafts. Refused where there are too few, or a request may mix fewer."""
    assert THREE.running({MEMORY: AUTO}) == ["bio", "law"]
    for gated, at_once, sentence in (
        (["law"], 3, "this server has 1 with a gate: name a memory"),
        (["law", "bio", "tax"], 2, 'may mix 2 of 3: start the server with "at_once": 3'),
    ):
        choices = Choices(NAMES, "law", gated, at_once=at_once)
        with pytest.raises(ValueError, match=sentence):
            check_extra_args({MEMORY: AUTO}, choices)


def test_images():
    """A memory that is off for them is left out of all gates, and refused where it is named."""
    images = ["an image"]
    assert THREE.resolve({MEMORY: AUTO}, images) == ((0, -1.0),)
    check_images({MEMORY: AUTO}, THREE)
    with pytest.raises(ValueError, match="The memory 'bio' is off for requests with images"):
        check_images({MEMORY: {"law": 0.3, "bio": 0.3}}, THREE)
    check_images({MEMORY: {"law": 0.3, "tax": 0.3}}, THREE)


def test_words_for_a_log():
    words = "memory 'bio', alpha 0.4; memory 'law', alpha 0.3"
    assert TWO.described({MEMORY: {"law": 0.3, "bio": 0.4}}) == words
    words = "memory 'law', alpha 'auto'; memory 'bio', alpha 'auto', at most 0.7"
    assert TWO.described({MEMORY: AUTO}) == words


def test_a_body():
    """An object is written as the string that vLLM's classes take, whatever the names are."""
    choices = Choices({"memory": 0.3, "memdec_alpha": 0.4}, "memory", at_once=2)
    body = {"prompt": "x", "vllm_xargs": {MEMORY: {"memory": 0.25, "memdec_alpha": 1e-7}}}
    check_body(body, ("prompt", "vllm_xargs"), False, choices, ())
    write_weights(body)
    assert body["vllm_xargs"] == {MEMORY: "memory:0.25,memdec_alpha:1e-07"}
    assert read_weights(body["vllm_xargs"][MEMORY]) == {"memory": 0.25, "memdec_alpha": 1e-7}
    for other in ({}, {"vllm_xargs": None}, {"vllm_xargs": {MEMORY: "law"}}, [1], "x"):
        write_weights(other)


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    return several.make(tiny_model, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"at_once": 5}, "'at_once' must be an integer from 1 to 4, the number of memories, got 5"),
        ({"at_once": 0}, "'at_once' must be an integer"),
        ({"at_once": True}, "'at_once' must be an integer"),
        ({"default": AUTO, "at_once": 1}, "may mix 1 of 2: start the server with \"at_once\": 2"),
    ],
)  # fmt: skip
def test_bad_settings(folders, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        MemDecConfig.parse(several.block(folders) | change)


def test_settings(folders):
    """A memory is not called "auto"; the model of that name is there where requests have it."""
    settings = several.block(folders)
    renamed = {"auto": settings["memories"]["law"]} | settings["memories"]
    with pytest.raises(ValueError, match="A memory cannot be called 'auto'"):
        MemDecConfig.parse(settings | {"memories": renamed})
    with pytest.raises(ValueError, match="this server has 0 with a gate"):
        few = {"memories": {"plain": settings["memories"]["plain"]}, "default": AUTO}
        MemDecConfig.parse(few)
    choices = Choices.of(MemDecConfig.parse(settings | {"default": AUTO}))
    assert choices.default == AUTO and choices.served[AUTO] == {MEMORY: AUTO}
    choices.check_served([AUTO], "the base")
    choices.give_up([AUTO])
    assert AUTO not in choices.served
    settings["memories"]["plain"] |= {"served_as": AUTO}
    taken = Choices.of(MemDecConfig.parse(settings))
    assert taken.served[AUTO] == {MEMORY: "plain"}
    taken.give_up([AUTO])
    assert AUTO in taken.served
    assert AUTO not in Choices.of(MemDecConfig.parse(several.block(folders, at_once=1))).served
