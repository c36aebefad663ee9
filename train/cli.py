"""The `memdec` command: plan a build, build a memory, seed, verify, explain or push one."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Annotated

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.faults import INSTALL

try:
    import typer
    from rich.console import Console

    from vllm_memdec.train.data.hub import model_folder
    from vllm_memdec.train.data.ownership import check_report
    from vllm_memdec.train.executor.start import choose_cluster, joined
    from vllm_memdec.train.explained import DEBUG, explained
    from vllm_memdec.train.options import (
        Alpha,
        Assignments,
        ContextTokens,
        DomainTexts,
        GeneralTexts,
        JsonFile,
        KeysBase,
        LearntTexts,
        Memories,
        Memory,
        Served,
        Sources,
        TextField,
        Texts,
        Trust,
        Update,
        Work,
        base_folder,
        fields,
        parse_bytes,
        served_folders,
        text_paths,
        with_text_field,
    )
    from vllm_memdec.train.playground.command import playground
    from vllm_memdec.train.progress import Progress
    from vllm_memdec.train.settings import load_settings
    from vllm_memdec.train.sharing.command import push
except ModuleNotFoundError as error:  # installed for serving only
    raise SystemExit(f"memdec: {error.name} {INSTALL}") from None

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

# What is asked of the hub is asked by hub.py, first of all; and we tell the progress.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",  # warnings name the hub's address
}


@app.callback()
def memdec(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MEMDEC_DEBUG", help="Show where an error was raised.")
    ] = False,
) -> None:
    """Memory Decoder: compile a corpus into a small model that vLLM serves beside any base."""
    DEBUG.set(debug)


@app.command()
def build(
    base: Annotated[str, typer.Option(help="Base model: folder, or ORG/NAME@REVISION.")],
    corpus: Annotated[Path, typer.Option(help="Text, JSON, ..., a folder, or a hub dataset.")],
    output: Annotated[Path, typer.Option(help="Folder for the artifacts; the memory is export/.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Text on which alpha is tuned; default: held-out documents.")
    ] = None,
    ray_address: Annotated[
        str,
        typer.Option(help="Ray cluster: HOST:PORT or auto; local: this machine; none: no Ray."),
    ] = "local",
    memory_budget: Annotated[
        str, typer.Option(help="RAM a process may take for what grows with the corpus.")
    ] = "4GiB",
    init: Annotated[
        str | None, typer.Option(help="Folder of a memory or model to start from: memory.init.")
    ] = None,
    adapt_tokenizer: Annotated[
        bool, typer.Option("--adapt-tokenizer", help="Adapt --init to the base's tokenizer.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(hidden=True, help="Old spelling.")] = None,
    update: Update = None,
    text_field: TextField = None,
    assignments: Assignments = None,
    until: Annotated[str, typer.Option(help="The last stage to make.")] = "export",
    trust_remote_code: Trust = False,
) -> None:
    """Compile a corpus into a memory: corpus, datastore, index, targets, memory, export."""
    progress = Progress()
    with explained(progress):
        given = {"init": init, "tokenizer": tokenizer, "adapt_tokenizer": adapt_tokenizer or None}
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = load_settings(config, with_text_field(assignments, text_field), chosen)
        from vllm_memdec.train.executor.context import Context
        from vllm_memdec.train.pipeline import build as run

        budget = parse_bytes(memory_budget, "--memory-budget")
        with joined(ray_address, output) as executor:
            if executor is None:  # the training of another process, to its end
                return
            context = Context(progress, executor, budget)
            made = run(base, corpus, output, settings, validation, context, until, update)
        if until != "export":
            progress.say(f"The last stage made is {made.path}. Without --until the rest follows.")
            return
        from vllm_memdec.train.evaluation.compare import serve_command

        if not os.path.lexists(os.path.expanduser(base)):  # of the hub: the commit that was read
            base = made.manifest.get("sources", {}).get("base", base)
        progress.say(f"The memory is {made.path}. Serve it beside its base:")
        progress.say(serve_command(base, {"model": str(made.path)}))


@app.command()
def seed(
    base: Annotated[str, typer.Option(help="Base model: folder, or ORG/NAME@REVISION.")],
    text: Annotated[Path, typer.Option(help="General text, of all kinds, as --corpus of build.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers of the base that it keeps.")],
    output: Annotated[Path, typer.Option(help="Folder for the artifacts; the seed is seed/.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    ray_address: Annotated[str, typer.Option(help="As for build.")] = "local",
    memory_budget: Annotated[str, typer.Option(help="As for build.")] = "4GiB",
    text_field: TextField = None,
    assignments: Assignments = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make a start for memories of a base, once: its weightiest layers, distilled on text."""
    progress = Progress()
    with explained(progress):
        words = with_text_field(assignments, text_field)
        settings = load_settings(config, words, {"layers": layers})
        from vllm_memdec.train.executor.context import Context
        from vllm_memdec.train.seeding import heal

        with joined(ray_address, output) as executor:
            if executor is not None:  # else the training of another process, to its end
                budget = parse_bytes(memory_budget, "--memory-budget")
                heal(base, text, output, settings, Context(progress, executor, budget))


@app.command()
def plan(
    base: Annotated[str, typer.Option(help="Base model: folder, or ORG/NAME@REVISION.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Text of the kind, a sample will do with --tokens.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1000, help="Size of the corpus; default: that of --corpus.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Text on which alpha is tuned, as for build.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    ray_address: Annotated[str, typer.Option(help="As for build.")] = "local",
    memory_budget: Annotated[str, typer.Option(help="As for build.")] = "4GiB",
    gpu: Annotated[
        str | None, typer.Option(help="Plan for a GPU that is not here: a100, h100, l4, ...")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many of them; default: one.")] = None,
    text_field: TextField = None,
    assignments: Assignments = None,
    trust_remote_code: Trust = False,
    work: Work = None,
    json_file: JsonFile = None,
) -> None:
    """Tell what a build will cost: measure a minute or two, then count time, disk and RAM."""
    progress = Progress()
    with explained(progress), contextlib.ExitStack() as stack:
        from vllm_memdec.train.data.artifacts import write_report
        from vllm_memdec.train.plan import report as planning

        check_report(json_file)
        if work is not None and not work.is_dir():
            raise MemdecError(f"{work} is no folder: create it, or check --work.")
        sample = tempfile.TemporaryDirectory(prefix="memdec-plan-", dir=work and work.resolve())
        folder = Path(stack.enter_context(sample))
        costs = planning.plan(
            base,
            corpus,
            validation,
            tokens,
            load_settings(config, with_text_field(assignments, text_field)),
            folder,
            progress,
            choose_cluster(ray_address, folder, "--work"),
            parse_bytes(memory_budget, "--memory-budget"),
            gpu,
            gpus,
        )
        planning.show(costs, Console())
        write_report(json_file, planning.report(costs))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="Output folder of a build, or a stage in it.")],
    sample: Annotated[int, typer.Option(min=1, help="Rows searched and scored, at most.")] = 1024,
    base: Annotated[
        Path | None, typer.Option(help="The build's base, to compare its answers with.")
    ] = None,
    trust_remote_code: Trust = False,
    json_file: JsonFile = None,
) -> None:
    """Check a build: files, hashes, index, labels, targets, memory. Exit code 1 if one fails."""
    progress = Progress()
    with explained(progress):
        from vllm_memdec.train.data.artifacts import write_report
        from vllm_memdec.train.verify import report as checking

        check_report(json_file)
        base = base and base_folder(base, progress)
        checks = checking.verify(artifact, sample, base, progress)
        checking.show(checks, Console())
        write_report(json_file, checking.report(artifact, checks))
        if failed := [check for check in checks if check.status == checking.FAILED]:
            raise MemdecError(f"{failed[0].name} failed: {failed[0].fix}")


@app.command()
def calibrate(
    memories: Memories,
    base: Served,
    domain: DomainTexts,
    general: GeneralTexts,
    corpus: LearntTexts = None,
    trust_remote_code: Trust = False,
    context: ContextTokens = None,
    text_field: TextField = None,
    json_file: JsonFile = None,
) -> None:
    """Train the memory's gate: a weight for each token, high where the memory knows its way.

    Of several memories the gates are trained together, for servers that mix all of them.
    """
    progress = Progress()
    with explained(progress):
        from vllm_memdec.train.data.artifacts import write_report
        from vllm_memdec.train.evaluation import gate_report, gate_together, gate_training

        check_report(json_file)
        given = {"domain": domain, "corpus": corpus or [], "general": general}
        texts = {name: text_paths(paths, f"--{name}", progress) for name, paths in given.items()}
        folders, read = [str(memory) for memory in memories], fields(text_field)
        rest = str(base_folder(base, progress)), texts, progress, context, read
        if len(folders) > 1:
            report = gate_together.calibrate_gates(folders, *rest)
            gate_together.show(report, Console())
        else:
            report = gate_training.calibrate_gate(folders[0], *rest)
            gate_report.show(report, Console())
        write_report(json_file, report)


@app.command()
def evaluate(
    memory: Memory,
    base: Served,
    text: Texts,
    alpha: Alpha = None,
    context: ContextTokens = None,
    text_field: TextField = None,
    json_file: JsonFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compare base, memory and mixture on text: perplexity, also by length of context."""
    progress = Progress()
    with explained(progress):
        from vllm_memdec.train.data.artifacts import write_report
        from vllm_memdec.train.evaluation import compare

        check_report(json_file)
        pair, read = served_folders(memory, base, progress), fields(text_field)
        texts = text_paths(text, "--text", progress)
        scores = compare.evaluate(*pair, texts, progress, alpha, context, read)
        compare.show(scores, Console())
        write_report(json_file, scores)


@app.command()
def alpha(
    memory: Memory,
    base: Annotated[Path, typer.Option(help="Folder of the base to tune it for.")],
    text: Texts,
    context: ContextTokens = None,
    text_field: TextField = None,
    json_file: JsonFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Tune the memory's weight for another base, on text of the domain that it has not learnt."""
    progress = Progress()
    with explained(progress):
        from vllm_memdec.train.data.artifacts import write_report
        from vllm_memdec.train.evaluation import compare

        check_report(json_file)
        pair, read = served_folders(memory, base, progress), fields(text_field)
        texts = text_paths(text, "--text", progress)
        weights = compare.best_weights(*pair, texts, progress, context, read)
        compare.show_weights(weights, Console())
        write_report(json_file, weights)


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="Any text.")],
    base: Annotated[Path, typer.Option(help="Folder of the base model (Hugging Face).")],
    memory: Annotated[Path, typer.Option(help="Folder of the memory: a build's export/.")],
    alpha: Alpha = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="How many the mixture writes after the text, at most.")
    ] = 16,
    sources: Sources = None,
    keys_base: KeysBase = None,
    trust_remote_code: Trust = False,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page there.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Tell of each token what base, memory and mixture gave it, and which of them decided."""
    progress = Progress()
    with explained(progress):
        from vllm_memdec.train.data.artifacts import write_report
        from vllm_memdec.train.evaluation import explain as explaining
        from vllm_memdec.train.evaluation.explain_page import page

        check_report(html_file, "--html")
        check_report(json_file)
        pair, found = served_folders(memory, base, progress), None
        if keys_base is not None:
            keys_base = model_folder(keys_base, "--keys-base", progress.say)
        if sources is not None:
            from vllm_memdec.train.evaluation import sources as finding

            found = finding.Sources(sources, pair[1], keys_base)
            found.check_memory(pair[0], progress.say)
        explanation = explaining.explain(pair[1], pair[0], prompt, alpha, tokens)
        if found is not None:
            explanation = found.added(explanation)
        explaining.show(explanation, Console())
        if html_file is not None:
            html_file.write_text(page(explanation), encoding="utf-8")
        write_report(json_file, explaining.report(explanation))


@app.command()
def check(
    base: Annotated[str, typer.Argument(help="Base: folder, or ORG/NAME@REVISION.")],
    memory: Annotated[
        str | None, typer.Argument(help="Memory: the same; default: a plain one.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Tell if vLLM serves a base beside a memory, without weights. Exit code 1 if it refuses."""
    progress = Progress()
    with explained(progress):
        from vllm_memdec import check as serving

        base = model_folder(base, "BASE", progress.say, weights=False)
        if memory is not None:
            memory = model_folder(memory, "MEMORY", progress.say, weights=False)
        answer = serving.check(base, memory, trust_remote_code)
    typer.echo(f"{answer.status}: {answer.reason}")
    if answer.status == serving.REFUSED:
        raise typer.Exit(1)
    typer.echo(f"drafts by the memory: {answer.drafts}")


app.command()(playground)
app.command()(push)


def main() -> None:
    """Run the command."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    app()


if __name__ == "__main__":
    main()
