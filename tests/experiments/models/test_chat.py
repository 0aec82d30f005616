"""Questions in a model's own template: its control tokens are tokens, those in a user's text are not."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from experiments.models import chat_prompt, load
from experiments.models.chat import Chat, end_ids
from experiments.models.chat_template import render
from tests.support.family_files import write_family

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate([*alphabet, "<|endoftext|>", "<|im", "in", "ng"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [("i", "n"), ("n", "g")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The first is in the model's vocabulary, the others are behind it.
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other|>"]
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in names])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def pieces():
    """Spaces become characters, and every piece of text gets one before it, as in Llama 2."""
    letters = ["<unk>", "<s>", "</s>", "▁", "▁a", *map(chr, range(33, 127))]
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in letters[:3]])
    return tokenizer


INST = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"


def chat_of(tokenizer, template, **tokens):
    return Chat("it", tokenizer, template, tokens, end_ids(tokenizer, []))


def test_a_prompt_is_the_template_with_its_control_tokens():
    chat = chat_of(byte_level(), CHATML)
    text = "<|im_start|>user\nA text.\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    want = chat.tokenizer.encode(text, add_special_tokens=False).ids
    assert chat_prompt(chat, "What is it? ", " A text.") == want
    assert chat.tokenizer.token_to_id("<|im_start|>") == want[0]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|other|>"])
def test_control_tokens_of_a_user_stay_characters(token):
    chat = chat_of(byte_level(), CHATML)
    count = {i: chat_prompt(chat, "so").count(i) for i in range(256, 266)}
    ids = chat_prompt(chat, f"so {token}{token} being", "one <|im_end|> of <tool>")
    for i, added in chat.tokenizer.get_added_tokens_decoder().items():
        assert ids.count(i) == (count.get(i, 0) if added.special else 1)
    shown = chat.tokenizer.decode(ids, skip_special_tokens=False)
    assert f"user\none <|im_end|> of <tool>\n\nso {token}{token} being<|im_end|>\n" in shown
    # Around them all is as ever: the merges of " being" too.
    assert ids[-18:] == chat_prompt(chat, "so being", "")[-18:]


def test_spaces_before_pieces_stay_where_they_are():
    chat = chat_of(pieces(), INST, bos_token="<s>")
    ids = chat_prompt(chat, "a </s> a")
    assert ids[0] == 1
    assert ids.count(2) == 0
    assert "".join(map(chat.tokenizer.id_to_token, ids)) == "<s>▁[INST]▁a▁</s>▁a▁[/INST]"
    assert chat_prompt(chat, "a")[:4] == chat.tokenizer.encode("<s>[IN").ids[:4]


def test_without_a_template_the_text_and_the_question_stand_alone():
    chat = chat_of(byte_level(), None)
    ids = chat_prompt(chat, "so <|im_end|>?", "A text.")
    assert max(ids) < 256
    assert chat.tokenizer.decode(ids) == "A text.\n\nso <|im_end|>?"


def test_ends_of_turns_are_those_named_and_those_known_by_their_text():
    tokenizer = byte_level()
    ids = [tokenizer.token_to_id(x) for x in ("<|endoftext|>", "<|im_end|>", "<|other|>")]
    assert end_ids(tokenizer, [ids[2], ids[0]]) == tuple(sorted(ids))
    assert end_ids(tokenizer, []) == tuple(sorted(ids[:2]))


RENDERED = {
    "loop controls": ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "so"),
    "what was generated": ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "so"),
    "objects": ("{{ messages[0] | tojson }}", '{"role": "user", "content": "so"}'),
    "lines of blocks": ("{% if true %}\n  {% if true %}\nso{% endif %}{% endif %}", "so"),
    "tokens": ("{{ bos_token }}so", "<s>so"),
    "a year": ("so {{ strftime_now('%Y')[:2] }}", "so 20"),
}


@pytest.mark.parametrize("case", RENDERED)
def test_templates_find_what_they_use(case):
    template, want = RENDERED[case]
    messages = [{"role": "user", "content": "so"}]
    assert render(template, messages, {"bos_token": "<s>"}, "it") == want


FAILING = {
    "it refuses": ("{{ raise_exception('no system role') }}", "in it fails: no system role"),
    "its syntax": ("{% for %}", "in it fails"),
    "what is not there": ("{{ messages[3].content }}", "in it fails"),
    "the question is left out": ("{{ messages[0].role }}", "does not give the question"),
    "it reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "in it fails"),
    "it changes its input": ("{% set _ = messages.append(1) %}", "in it fails"),
    "it goes on": ("{% for i in range(10 ** 9) %}x{% endfor %}", "in it fails"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_template_that_fails_is_named(case):
    template, words = FAILING[case]
    with pytest.raises(ValueError, match=r"\S") as error:
        chat_prompt(chat_of(byte_level(), template), "so")
    assert f"the chat template {words}" in str(error.value) or words in str(error.value)


@pytest.fixture
def directory(tmp_path):
    write_family(tmp_path, "qwen3")
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<e>", *"abc:"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>", "</s>", "<e>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def about(directory, **settings):
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load(directory).chat


def test_a_directory_says_its_template_and_ends(directory):
    assert about(directory).template is None
    assert about(directory).end_ids == (1, 2)  # of config.json, and </s>
    bos, eos = {"content": "<s>", "lstrip": False}, "<e>"
    chat = about(directory, chat_template=INST, bos_token=bos, eos_token=eos)
    assert (chat.template, dict(chat.tokens)) == (INST, {"bos_token": "<s>", "eos_token": "<e>"})
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert about(directory, chat_template=several).template == "d"
    template = "{{ bos_token }}a:{{ messages[0].content }}"
    for mark in ("", "\ufeff"):  # a byte-order mark is no part of it
        (directory / "chat_template.jinja").write_text(mark + template)
        chat = about(directory, chat_template=INST, bos_token=bos)
        assert chat.template == template
        assert chat_prompt(chat, "b") == [0, 3, 6, 4]
    (directory / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is no UTF-8 text"):
        about(directory)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_template": 3}, "chat_template=3"),
        ({"eos_token": 3}, "eos_token=3"),
    ],
)
def test_settings_of_a_directory_are_checked(directory, settings, words):
    with pytest.raises(ValueError, match=words):
        about(directory, **settings)


def test_smollm2_ends_its_turn_and_reads_a_question(smollm2):
    """Its own template, with a system prompt of its own."""
    chat = load("smollm2").chat
    ids = chat_prompt(chat, "What is it?", "A text with <|im_end|> in it.")
    shown = chat.tokenizer.decode(ids, skip_special_tokens=False)
    assert shown.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert shown.endswith("in it.\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(2) == 2
    assert chat.end_ids == (0, 2)
