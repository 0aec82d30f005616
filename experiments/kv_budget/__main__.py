"""Fit a real model's attention into given device memory.

python -m experiments.kv_budget run --device-memory 4MiB,2MiB     (some 4 minutes on 2 cores)
python -m experiments.kv_budget run --device-memory 4MiB,2MiB --keep "[A-Z]{3,}"   (by a rule)
python -m experiments.kv_budget run --device-memory 2MiB,1MiB,1MiB,1MiB --processes 2 --save DIR
python -m experiments.kv_budget resume --state DIR --device-memory 3MiB,3MiB   (on other devices)
python -m experiments.kv_budget stream --device-memory 1MiB --new-tokens 2000   (a long decode)
python -m experiments.kv_budget cases --out FILE.npz              (real texts for `score`)
python -m experiments.kv_budget score --cases FILE.npz --budget 0.25 --policy ladder --json OUT
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.harness import cli, files, guard, processes
from experiments.models import options as models

MODULE = "experiments.kv_budget"
# JAX is imported by the jobs: a guard does without.


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def job(options: argparse.Namespace) -> int | None:
        if options.job in ("run", "resume"):
            processes.check_options(options)
            if options.processes > 1 and not guard.guarded():
                return _many(options, arguments)
        if options.job == "run":
            _run(options, shlex.join(["python", "-m", MODULE, *arguments]))
        else:
            jobs = {"score": _score, "cases": _cases, "stream": _stream, "resume": _resume}
            jobs[options.job](options)
        return None

    return cli.run(_parser(), job, arguments)


def _many(options: argparse.Namespace, arguments: list[str]) -> int:
    """This process is the one that starts the others, or one of them: a guard."""
    if options.coordinator is None:
        return processes.launch(MODULE, arguments, options.processes)
    command = [sys.executable, "-m", MODULE, *arguments]
    return guard.run(command, options.coordinator, options.process_id, options.processes)


def _run(options: argparse.Namespace, command: str) -> None:
    memory = tuple(cli.memory("--device-memory", options.device_memory))
    processes.join(options, len(memory))

    from experiments.harness import progress
    from experiments.kv_budget import report, run

    policies = options.policies.split(",") if options.policies else run.DEFAULT_POLICIES
    path = Path(options.out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {options.out!r} is a file: give a folder")
    files.check_writable(path / "report.json")
    settings = run.Settings(
        command=command,
        memory_bytes=memory,
        text_name=options.text or options.source,
        text=_text(options),
        context_tokens=options.context_tokens,
        continuation_tokens=options.continuation_tokens,
        new_tokens=options.new_tokens,
        policies=tuple(policies),
        save=options.save,
        keep=options.keep,
    )
    if options.save is not None:
        files.check_writable(Path(options.save) / "manifest.json")
    steps = run.steps_of(settings)
    found = models.loaded(options)
    with progress.display() as bar:
        task = bar.add_task("starting", total=steps)

        def step(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        result = run.run(settings, found, step)
    digest = processes.agree(run.outcome(result))
    print(f"digest of the tokens and figures: {digest}")
    if options.process_id:
        return  # one process writes the report
    with files.locked(path / "report.json"):
        report.write(result, path)
    report.print_table(result)
    print(f"report: {path / 'report.html'}, {path / 'report.json'}")


def _resume(options: argparse.Namespace) -> None:
    memory = cli.memory("--device-memory", options.device_memory)
    processes.join(options, len(memory))

    from experiments.kv_budget import resume

    keep = files.json_writer(None if options.process_id else options.json)  # one process writes
    found = models.loaded(options)
    model, tokenizer = found.model, found.spoken.tokenizer
    result = resume.resume(Path(options.state), model, memory)
    digest = processes.agree(result)
    result["text"] = tokenizer.decode(result["tokens"])
    keep(result)
    for name, value in result.items():
        print(f"{name}: {value}")
    print(f"digest of the tokens and bytes: {digest}")


def _stream(options: argparse.Namespace) -> None:
    from experiments.harness import progress, texts
    from experiments.kv_budget import stream

    if options.new_tokens < 1:
        raise ValueError(f"--new-tokens is {options.new_tokens}: at least 1")
    memory = cli.memory("--device-memory", options.device_memory)
    if len(memory) > 1:
        raise ValueError(f"--device-memory has {len(memory)} entries: a long decode has one device")
    text = _text(options)
    keep = files.json_writer(options.json)
    found = models.loaded(options)
    model, tokenizer = found.model, found.spoken.tokenizer
    context = texts.encode(tokenizer, text)[: options.context_tokens]
    if len(context) < options.context_tokens:
        raise ValueError(
            f"--context-tokens is {options.context_tokens}: the text has {len(context)} tokens"
        )
    with progress.display() as bar:
        task = bar.add_task("tokens", total=options.new_tokens)
        result = stream.stream(
            model,
            context,
            memory_bytes=memory[0],
            new_tokens=options.new_tokens,
            step=lambda n: bar.advance(task, n),
        )
    tokens = result.pop("tokens")
    keep(result | {"text": tokenizer.decode(tokens)})
    for name, value in result.items():
        print(f"{name}: {value}")


def _text(options: argparse.Namespace) -> str:
    from experiments.harness import texts

    return texts.read_file(options.text) if options.text else texts.text_of(options.source)


def _score(options: argparse.Namespace) -> None:
    from experiments.harness import progress
    from experiments.kv_budget import policies, score

    names = options.policy.split(",")
    for name in names:
        policies.policy_of(name)
    budgets = cli.numbers("--budget", options.budget)
    keep = files.json_writer(options.json)
    model = models.loaded(options).model
    cases = score.read_cases(options.cases, model.config.vocab_size)
    with progress.display() as bar:
        total = sum(len(x) for name, x in cases.items() if name.endswith("_ctx"))
        task = bar.add_task("contexts", total=total)

        def step(results: dict[str, Any]) -> None:
            keep(results)
            bar.advance(task)

        results = score.score(model, cases, names, budgets, step)
    for row in results["results"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row["mean"].items())
        print(f"{row['policy']} at {row['budget']:g}: {figures}")


def _cases(options: argparse.Namespace) -> None:
    from experiments.harness import progress
    from experiments.kv_budget import data, evaluate

    out = Path(options.out)
    files.check_writable(out)
    found = models.loaded(options)
    model, tokenizer = found.model, found.spoken.tokenizer
    names, answers = options.texts.split(","), evaluate.answers_with_everything(model)
    with progress.bar("cases", len(names) * options.per_text) as advance:

        def accept(case: data.Case) -> bool:
            accepted = answers(case)
            if accepted:
                advance()
            return accepted

        arrays = data.case_arrays(
            tokenizer,
            names,
            per_text=options.per_text,
            context_tokens=options.context_tokens,
            continuation_tokens=options.continuation_tokens,
            accept=accept,
        )
    files.write_npz(out, arrays)
    print(", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items()))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(MODULE, __doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    run = cli.add_job(jobs, "run", "one context within the devices' memory, with a report")
    run.add_argument(
        "--device-memory", metavar="SIZES", required=True, help="one size a device: 4MiB,2MiB"
    )
    run.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text file; if left out, a text from a package"
    )
    run.add_argument("--source", default="lcet10", help="which text from a package, without --text")
    run.add_argument("--context-tokens", type=int, default=1280, help="of the text that are read")
    run.add_argument("--continuation-tokens", type=int, default=128, help="tokens to predict")
    run.add_argument(
        "--new-tokens", type=int, default=24, help="tokens to decode after the pass key's question"
    )
    run.add_argument("--policies", metavar="NAMES", help="with commas; the last one is pictured")
    run.add_argument(
        "--keep",
        metavar="REGEX",
        help="what it matches of the text always stays, in policies with a price for every token",
    )
    run.add_argument("--out", metavar="DIR", default="out/kv_budget", help="folder of the report")
    run.add_argument(
        "--save",
        metavar="DIR",
        help="folder, the same for all processes: the last policy's state, half of the tokens there",
    )
    processes.add_options(run)
    resume = cli.add_job(jobs, "resume", "a saved decode goes on, on any devices")
    resume.add_argument("--state", metavar="DIR", required=True, help="folder of run --save")
    resume.add_argument(
        "--device-memory", metavar="SIZES", required=True, help="one size a device: 4MiB,2MiB"
    )
    processes.add_options(resume)
    cli.add_json(resume)
    stream = cli.add_job(jobs, "stream", "a prompt and a long decode at constant bytes")
    stream.add_argument(
        "--device-memory", metavar="SIZES", required=True, help="of one device: 1MiB"
    )
    stream.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text file; if left out, a text from a package"
    )
    stream.add_argument(
        "--source", default="lcet10", help="which text from a package, without --text"
    )
    stream.add_argument(
        "--context-tokens", type=int, default=1280, help="of the text that are read"
    )
    stream.add_argument("--new-tokens", type=int, default=2000, help="tokens to decode")
    cli.add_json(stream)
    cases = cli.add_job(jobs, "cases", "cases for score, from real texts")
    cases.add_argument("--texts", metavar="NAMES", default="lcet10,plrabn12", help="with commas")
    cases.add_argument("--per-text", type=int, default=5, help="cases of each kind")
    cases.add_argument("--context-tokens", type=int, default=1280, help="of the text that are read")
    cases.add_argument("--continuation-tokens", type=int, default=128, help="tokens to predict")
    cases.add_argument("--out", metavar="OUT", required=True, help="an .npz file")
    score = cli.add_job(jobs, "score", "policies on given cases, at fractions of the full cache")
    score.add_argument("--cases", metavar="FILE", required=True, help="an .npz file of token ids")
    score.add_argument(
        "--budget", metavar="PARTS", required=True, help="fractions of the full cache, with commas"
    )
    score.add_argument("--policy", metavar="NAMES", required=True, help="with commas")
    cli.add_json(score, required=True)
    for job in (run, resume, stream, cases, score):
        models.add_options(job)
    return parser


if __name__ == "__main__":
    sys.exit(main())
