"""Uses of public names: found through imports and aliases, and nothing that is not public."""

from experiments.harness import uses
from tests.support.together import ROOT


def test_references_through_imports_and_aliases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "one.py").write_text(
        "import jbalance as jb\n"
        "from jbalance import shares as s, place\n"
        "from jbalance.decode.model import Model\n"
        "s.proportional([1.0]); place.pack; jb.cache.create; jb.cache.create.x\n"
        "proportional = softmax = None\n"
    )
    found = uses.of_experiments(folder.relative_to(tmp_path))
    used = {name for name, users in found.items() if users}
    assert used == {
        "jbalance.shares.proportional",
        "jbalance.place.pack",
        "jbalance.cache.create",
        "jbalance.decode.Model",
    }
    assert found["jbalance.place.pack"] == ["experiments.one"]


def test_names_are_the_public_ones():
    names = uses.public_names()
    assert len(names) == len(set(names))
    for name in ("jbalance.audit.by_group", "jbalance.balancer", "jbalance.adapters.NnxCache"):
        assert name in names
    assert not any(part.startswith("_") for name in names for part in name.split("."))


def test_every_public_name_has_a_user(monkeypatch):
    """What no study, command or benchmark uses is not needed, or not tried."""
    monkeypatch.chdir(ROOT)
    through = uses.through()
    nobodys = [x for x, users in uses.of_experiments().items() if not users and x not in through]
    assert not nobodys


def test_names_that_a_used_one_leads_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "one.py").write_text("import jbalance as jb\njb.importance.combined\n")
    found = uses.through(folder.relative_to(tmp_path))
    # Through the table of scorers, which is a default of the function.
    assert found["jbalance.importance.TOKEN_SCORERS"] == "jbalance.importance.combined"
    assert found["jbalance.importance.attention_mass"] == "jbalance.importance.TOKEN_SCORERS"
    assert "jbalance.importance.combined" not in found
    assert "jbalance.tasks.divide" not in found


def test_a_module_in_a_table_leads_to_what_it_defines_and_an_imported_one_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "one.py").write_text("from jbalance import attention, rescale\nattention.attend\n")
    found = uses.through(folder.relative_to(tmp_path))
    # The gradients of the kernels, which the table of back ends holds as modules.
    assert found["jbalance.attention.transposed"] == "jbalance.attention.attend"
    assert "jbalance.rescale.logit_bias" not in found
