"""Training from scratch: the arms compute what they were given, compile once, and learn."""

import numpy as np
import pytest

from experiments.tiles import train as command
from experiments.tiles import training

TOKENS = 256


def test_the_end_of_every_text_is_held_out():
    own, held, tokenizer = training.texts()
    assert 0.05 < len(held) / (len(own) + len(held)) < 0.2
    assert tokenizer.get_vocab_size() == training.VOCABULARY
    assert max(own.max(), held.max()) < training.VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("arm", training.ARMS)
def test_an_arm_learns_and_compiles_twice_with_its_dense_start(arm):
    steps = []
    settings = training.Settings(12, TOKENS, 0.5, 0.5)
    out = training.train(arm, 0, settings, lambda: steps.append(1))
    assert len(steps) == 12
    assert out["parameters"] > 2_000_000
    assert out["figures"]["traces"] == 2
    assert out["figures"]["held_out"] < np.log(training.VOCABULARY)
    shares = out["layer_shares"]
    assert not shares or abs(np.mean(shares) - 0.5) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "dense,best"], "--arms is 'best'"),
        (["--density", "0"], "--density is 0.0"),
        (["--tokens", "100"], "--tokens is 100"),
        (["--steps", "1"], "--steps is 1"),
        (["--dense-start", "2"], "--dense-start is 2.0"),
    ],
)
def test_bad_arguments_are_one_line(capsys, tmp_path, arguments, message):
    assert command.main([*arguments, "--json", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
