"""Every claim of the README beside the tests and the results that hold it."""

import ast
import functools
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAT = " ".join(README.split())
FIGURES_TEST = (
    "tests/experiments/harness/test_figures.py::test_every_figure_of_the_pages_has_a_file"
)
HERE = "tests/docs/test_readme_claims.py::"
README_TEST = "tests/docs/test_readme.py::"

# A sentence or a part of it, as README says it, and what asserts it: tests, or files of results.
CLAIMS = {
    "every cached token, tile, head, layer and request gets the memory and compute that it is worth": [
        "tests/cache/test_price.py",
        "tests/adapters/test_tile_balance.py::test_a_layer_that_needs_more_gets_more",
        "tests/decode/test_generate.py::test_memory_is_shared_by_weight",
    ],
    "within each device's budget, and attention stores and computes nothing else": [
        "tests/decode/test_context.py::test_every_devices_bytes_are_kept",
        "tests/cache/test_step.py::test_two_thousand_tokens_in_constant_bytes",
        "tests/attention/test_attend_transforms.py::test_tiles_that_are_left_out_are_not_read",
    ],
    "needs jax, flax, optax, chex and numpy, Python 3.11 or newer": [
        HERE + "test_the_library_needs_what_the_readme_says",
    ],
    "Pure functions over arrays, which run under `jit`, `vmap` and `shard_map`": [
        "tests/test_balance.py::test_new_data_never_compiles_again",
        "tests/attention/test_attend_transforms.py::test_vmap_and_its_gradient",
        "tests/sharded/test_sharded.py::test_the_same_on_any_number_of_devices",
    ],
    "everything on CPUs, on 8 simulated devices and in two processes": [
        "tests/sharded/test_sharded.py::test_the_same_on_any_number_of_devices",
        "tests/sharded/test_two_processes.py::test_two_processes_do_all",
        "tests/experiments/kv_budget/test_processes.py::test_two_processes_decode_as_one_does",
    ],
    "whole programs for pods of up to 4,096 chips were compiled by the TPUs' and GPUs' own compilers": [
        "docs/results/compiled.json",
        HERE + "test_programs_were_compiled_for_as_many_chips",
    ],
    "answers a question about your text within the memory of two devices, token by token": [
        "tests/experiments/test_generate.py::test_an_ample_memory_answers_as_the_model_does",
        "tests/experiments/test_generate.py::test_characters_are_written_when_they_are_whole",
    ],
    "`experiments.chat` talks": [
        "tests/experiments/test_chat.py::test_turns_in_an_ample_memory_are_those_of_one_text",
    ],
    "Models are Hugging Face directories and GGUF files of the families Llama, Mistral, Qwen, Gemma, "
    "Phi-3, SmolLM3 and Mixtral": [
        "tests/experiments/models/test_families.py::test_logits_are_those_of_transformers",
        "tests/experiments/models/test_families.py::test_gguf_logits_are_those_of_transformers",
    ],
    "without `--model` it is the small SmolLM2": [
        "tests/experiments/models/test_smollm2_golden.py::test_greedy_continuation_is_identical",
    ],
    "What is not implemented of a model is refused by name": [
        "tests/experiments/models/test_checkpoint_settings.py::test_hf_refuses_by_name",
        "tests/experiments/models/test_checkpoint_settings.py::test_gguf_refuses_by_name",
    ],
    "A model of your own, in a few lines": [
        "tests/docs/test_how_to.py::test_the_how_to_runs_from_the_wheel",
    ],
    "SmolLM2-135M, 1,280 tokens: mean KL to the full cache; pass keys found, of 16 | 25 % of the bytes "
    "| 10 % | 5 %": [
        README_TEST + "test_the_table_of_the_readme_is_that_of_the_recorded_run",
    ],
    "| `ladder` | **0.0002**, 16 | **0.0029**, 16 | **0.013**, 16 |": [
        "docs/results/kv_budget.score.json",
        README_TEST + "test_the_table_of_the_readme_is_that_of_the_recorded_run",
    ],
    "reads the context again | **0.0001**, 16 | **0.0024**, 16 | **0.012**, 16 |": [
        "docs/results/kv_budget.score.json",
        README_TEST + "test_the_table_of_the_readme_is_that_of_the_recorded_run",
    ],
    "`uniform`: 16 bits, eight scorers combined | 0.0403 | 0.1045 | 0.188 |": [
        "docs/results/kv_budget.score.baselines.json",
        FIGURES_TEST,
    ],
    "`jb.explain.sentence(context.plan, context.codes, layer=7, head=1)` says why a head keeps what it "
    'keeps: "... because device 0 is full: the best that it left out is worth 1.71 a KiB, and the price '
    'is 5.42. 72.50 KiB more there would buy ..."': [
        "tests/docs/test_explain_how_to.py::test_the_how_to_runs",
        "tests/explain/test_heads.py::test_the_sentence_says_what_more_memory_buys",
    ],
    "What you know of a text goes in by rules": [
        "tests/decode/test_rules.py::test_what_attention_alone_loses_stays_by_a_rule",
        "tests/docs/test_explain_how_to.py::test_the_how_to_runs",
    ],
    "A model's weights can [share its memory](docs/how_to/decode_your_model.md), at one price": [
        "tests/decode/test_memory.py::test_the_choice_is_within_one_step_of_the_best_of_all",
        "tests/decode/test_memory.py::test_it_decodes_within_the_memory",
    ],
    "Requests join, grow and leave without a recompile": [
        "tests/decode/test_requests_machine.py::test_requests_that_come_and_go_compile_nothing_anew",
    ],
    "many questions share one context that is read once": [
        "tests/decode/test_context.py::test_many_questions_read_it_once_and_answer_as_alone",
    ],
    "states move to other devices": [
        "tests/decode/test_saved.py::test_other_devices_go_on_with_the_same_tokens",
    ],
    "The cache below can be called from [any attention](docs/how_to/cache.md)": [
        README_TEST + "test_the_code_of_the_page_on_the_cache_runs",
    ],
    # No file of the repository holds this run either.
    "At half of the causal tiles of SmolLM2's prefill of 2,048 tokens the KL to dense attention is "
    "0.0089, where a window and the first keys have 0.0535": [
        FIGURES_TEST,
        "tests/experiments/tiles/test_prefill.py::test_the_ladder_loses_less_than_the_others",
    ],
    "A stock model and its training step; what balancing changes is marked, six lines": [
        HERE + "test_six_lines_are_marked",
        README_TEST + "test_the_code_of_the_readme_runs",
    ],
    "In linen `LinenBalancedAttention` is the `attention_fn`": [
        "tests/adapters/test_tile_balance.py::test_linen_budgets_move_between_layers_too",
    ],
    "`NnxCache` and `LinenCachedAttention` decode stock attention in fixed bytes": [
        "tests/adapters/test_decoding.py::test_its_bytes_stay_and_it_begins_anew",
        "tests/adapters/test_decoding.py::test_a_linen_model_decodes_too_with_the_stock_parameters",
    ],
    "From importance over whole amounts, prices and placement to attention, tasks and their audit each "
    "step is a function of its own": [
        "tests/test_pipeline_order.py::test_imports_point_up_the_pipeline",
    ],
    "a bad argument is a `ValueError` that names it, its value and what would fit": [
        "tests/test_bad_input.py::test_the_error_names_argument_value_and_what_fits",
        "tests/properties/test_bad_arguments.py::test_a_bad_argument_is_named",
    ],
    "[models of other packages]": ["tests/docs/test_other_models.py"],
    "Notebooks: `colab/`": ["tests/docs/test_notebooks.py::test_a_notebook_runs"],
    "[the method and its errata]": ["tests/docs/test_method_example.py::test_rescaling_as_printed"],
    "[trained models in fourteen domains](docs/results.md), also where it does not help": [
        HERE + "test_fourteen_domains_have_results",
    ],
    "Apache-2.0": [HERE + "test_the_license_is_the_one_named"],
}
# Said, and nothing of the repository can assert it.
UNTESTED = {"no accelerator has run them yet": "a fact about what has not been done"}


@functools.cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def number(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*", text)


@pytest.mark.parametrize("claim", [*CLAIMS, *UNTESTED])
def test_the_readme_says_it(claim):
    assert claim in FLAT


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_holds_a_claim_is_there(claim):
    assert CLAIMS[claim]
    for holder in CLAIMS[claim]:
        name, _, function = holder.partition("::")
        assert (ROOT / name).is_file(), name
        if name.endswith(".py"):
            found = functions_of(ROOT / name)
            assert function in found if function else any(x.startswith("test") for x in found)


def test_every_figure_of_the_prose_is_in_a_claim():
    prose = re.sub(r"```python\n.*?```", "", README, flags=re.DOTALL)
    prose = re.sub(r"^    .*$", "", prose, flags=re.M)  # commands and code
    left = " ".join(prose.split())
    for claim in CLAIMS:
        left = left.replace(claim, "")
    assert number(left) == []


def test_the_library_needs_what_the_readme_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.match(r"[\w-]+", x)[0] for x in project["dependencies"]}
    said, least = re.search(r"needs ([\w, ]+), Python ([\d.]+) or newer", FLAT).groups()
    # jaxlib is jax's own half.
    assert needed - {"jaxlib"} == set(re.split(r", | and ", said))
    assert project["requires-python"] == f">={least}"


def test_programs_were_compiled_for_as_many_chips():
    compiled = json.loads((ROOT / "docs/results/compiled.json").read_text(encoding="utf-8"))
    chips = [int(x) for x in re.findall(r"(\d+) chips", json.dumps(compiled["pods"]))]
    assert max(chips) == 4096


def test_six_lines_are_marked():
    (code,) = (
        x for x in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "NnxBalance" in x
    )
    assert len(re.findall(r"# \+", code)) == 6


def test_fourteen_domains_have_results():
    design = " ".join((ROOT / "docs/design.md").read_text(encoding="utf-8").split())
    domains = re.search(r"studies in domains \(([\w, ]+)\)", design)[1].split(", ")
    assert len(domains) == 14
    for name in domains:
        assert (ROOT / "experiments" / name / "__main__.py").is_file(), name
        assert (ROOT / "docs" / "results" / f"{name}.json").is_file(), name
    assert "does not help" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_license_is_the_one_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target
