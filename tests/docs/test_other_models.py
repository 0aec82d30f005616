"""Model code of other packages by the how-to's lines, where `make others` has installed them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.other_models import BLOCKS, sections

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "experiments" / "others" / ".venv" / "bin" / "python"
LINES = {title: 10 for title in sections() if title} | {"penzai": 21}


def lines_of(block):
    return [x for x in block.splitlines() if x.strip() and not x.lstrip().startswith("#")]


@pytest.mark.parametrize("title", LINES)
def test_it_takes_ten_lines(title):
    blocks = sections()[title]
    assert len(blocks) == BLOCKS
    _, decoder, training, decoding = map(lines_of, blocks)
    assert decoder
    for use in (training, decoding):
        assert len(use) == 1
        assert len(decoder + use) <= LINES[title]
    assert max(map(len, decoder + training + decoding)) <= 100
    assert not any(";" in line for line in decoder + training + decoding)


@pytest.mark.others
@pytest.mark.skipif(not PYTHON.exists(), reason="make others")
@pytest.mark.parametrize("title", LINES)
def test_it_is_the_package_s_own(title):
    """Half of the tiles train; with all, and with bytes that hold all, the outputs are the package's."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [str(PYTHON), "-m", "tests.support.other_models", title]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sys.stdout.write(done.stdout)
