"""The command that answers questions: its bad inputs are one line, its answer is the model's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.generate import Written, main
from experiments.models import chat_prompt, greedy

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "LICENSE")
ASK = ["--text", TEXT, "--question", "Who may copy it?"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([*ASK, "--memory", "4 apples"], "--memory: bytes"),
        ([*ASK, "--memory", "8MiB", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--question", " ", "--memory", "8MiB"], "--question is empty"),
        (["--text", "no/such", "--question", "x", "--memory", "8MiB"], "--text 'no/such' cannot"),
        ([*ASK, "--memory", "8MiB", "--temperature", "-1"], "temperature is -1"),
        ([*ASK, "--memory", "64KiB"], "give at least"),
        ([*ASK, "--memory", "2MiB,4KiB"], "budgets_bytes[1]"),
        ([*ASK, "--memory", "8MiB", "--keep", "("], "--keep is '(', no regular expression"),
        ([*ASK, "--memory", "8MiB", "--keep", "marmalade"], "--keep is 'marmalade': nothing"),
        ([*ASK, "--memory", "8MiB", "--max-new-tokens", "9000"], "--max-positions"),
    ],
)
@pytest.mark.usefixtures("loaded_once")
def test_bad_arguments_are_one_line(capsys, arguments, names):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert names in error
    assert "Traceback" not in error
    assert "reading" not in error  # before the prompt is read
    assert out == ""


@pytest.mark.usefixtures("loaded_once")
def test_a_rule_that_keeps_too_much_is_named(capsys):
    assert main([*ASK, "--memory", "8MiB", "--keep", "."]) == 2
    assert (
        "error: --keep: the tokens of all requests that always stay need" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model", "no/such"], "there is no model 'no/such'"),
        (["--model", TEXT], "LICENSE"),
        (["--model", str(ROOT)], "no config.json"),
        (["--tokenizer", TEXT], "there is no tokenizer at"),
    ],
)
def test_bad_models_are_one_line(capsys, arguments, names):
    assert main([*arguments, *ASK, "--memory", "8MiB"]) == 2
    assert names in capsys.readouterr().err


def test_characters_are_written_when_they_are_whole(capsys, smollm2):
    tokenizer, text = smollm2[2], "Ein Geschäft für 3 € – 語\n"
    ids, written, seen = tokenizer.encode(text).ids, Written(tokenizer), ""
    for i in range(len(ids)):
        written.show(ids[: i + 1])
        seen += capsys.readouterr().out
        assert text.startswith(seen)
    written.end(ids)
    assert seen + capsys.readouterr().out == text + "\n"


@pytest.mark.slow
def test_an_ample_memory_answers_as_the_model_does(smollm2_loaded, tmp_path):
    """From the command line, over two devices, against greedy decoding with a dense cache."""
    command = [sys.executable, "-m", "experiments.generate", *ASK, "--memory", "30MiB,20MiB"]
    command += ["--max-new-tokens", "12", "--json", str(tmp_path / "it.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    chat = smollm2_loaded.spoken
    prompt = chat_prompt(chat, "Who may copy it?", Path(TEXT).read_text(encoding="utf-8"))
    want = np.asarray(greedy(smollm2_loaded.model, np.array([prompt]), 12))[0].tolist()
    stops = [i for i, token in enumerate(want) if token in chat.end_ids]
    want = want[: stops[0]] if stops else want
    assert done.stdout == smollm2_loaded.tokenizer.decode(want) + "\n"
    held = re.search(r"cache: ([\d,]+) of 31,457,280, ([\d,]+) of 20,971,520 bytes", done.stderr)
    assert held is not None
    written = json.loads((tmp_path / "it.json").read_text())
    assert written["answer"] + "\n" == done.stdout
    assert (written["prompt_tokens"], written["answer_tokens"]) == (len(prompt), len(want))
    assert written["cache_bytes"] == [int(x.replace(",", "")) for x in held.groups()]
    assert written["memory_bytes"] == [30 << 20, 20 << 20]
