"""The how-to's code runs from the built wheel, in a folder without the repository, on two devices."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how_to" / "decode_your_model.md"
START = """
import jax
import jbalance
from pathlib import Path

assert Path(jbalance.__file__).is_relative_to({folder!r}), jbalance.__file__
jax.config.update("jax_num_cpu_devices", 2)
"""


def test_the_how_to_runs_from_the_wheel(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 3
    wheel, installed, elsewhere = (tmp_path / name for name in ("wheel", "installed", "elsewhere"))
    elsewhere.mkdir()
    source = tmp_path / "source"  # a copy: what an earlier build left behind would enter the wheel
    shutil.copytree(ROOT / "jbalance", source / "jbalance")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheel), str(source)]
    subprocess.run([*pip, *build], check=True, cwd=elsewhere)
    (built,) = wheel.iterdir()
    target = ["install", "--no-deps", "--no-index", "--target", str(installed), str(built)]
    subprocess.run([*pip, *target], check=True, cwd=elsewhere)
    assert (installed / "jbalance" / "py.typed").exists()
    assert not (installed / "experiments").exists()
    script = elsewhere / "how_to.py"
    script.write_text("\n".join([START.format(folder=str(installed)), *blocks]), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    subprocess.run([sys.executable, str(script)], check=True, cwd=elsewhere, env=environment)
