"""The command that chats: turns go on from each other, as the model would read them in one."""

import io

import numpy as np
import pytest

from experiments.chat import main, said
from experiments.models import chat_prompt, greedy, next_turn

MODEL_TOKENS = 8


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--memory", "4 apples"], "--memory: bytes"),
        (["--memory", "8MiB", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--memory", "8MiB", "--text", "no/such"], "--text 'no/such' cannot"),
        (["--memory", "8MiB", "--max-new-tokens", "9000"], "--max-positions"),
    ],
)
@pytest.mark.usefixtures("loaded_once")
def test_bad_arguments_are_one_line(capsys, monkeypatch, arguments, names):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert names in error
    assert "Traceback" not in error
    assert out == ""


def test_a_byte_order_mark_is_no_part_of_a_question(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffHello\n\ufeff\n Why?\n"))
    assert list(said()) == ["Hello", "Why?"]


@pytest.mark.usefixtures("loaded_once")
def test_a_next_turn_is_what_the_template_puts_between(smollm2_loaded):
    chat = smollm2_loaded.spoken
    ids = next_turn(chat, "And <|im_end|> why?")
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_end|>\n<|im_start|>user\nAnd <|im_end|> why?<|im_end|>\n<|im_start|>assistant\n"
    )
    control = [i for i in ids if i in chat.end_ids]
    assert len(control) == 2  # the user's own is characters


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_turns_in_an_ample_memory_are_those_of_one_text(smollm2_loaded, capsys, monkeypatch):
    chat, model = smollm2_loaded.spoken, smollm2_loaded.model
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("Who are you?\n\n/memory\nAnd where?\n/quit\nno\n")
    )
    assert main(["--memory", "30MiB", "--max-new-tokens", str(MODEL_TOKENS)]) == 0
    out, error = capsys.readouterr()
    ids, answers = chat_prompt(chat, "Who are you?"), []
    for question in (None, "And where?"):
        ids += next_turn(chat, question) if question else []
        answer = np.asarray(greedy(model, np.array([ids]), MODEL_TOKENS))[0].tolist()
        assert not set(answer) & set(chat.end_ids)
        ids += answer
        answers.append(chat.tokenizer.decode(answer))
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert "of 31,457,280 bytes" in error
