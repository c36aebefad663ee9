"""The `memdec` command. `memdec build` compiles a corpus into a memory."""

import errno
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from vllm_memdec.train.config import load_settings
from vllm_memdec.train.progress import Progress

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def memdec() -> None:
    """Memory Decoder: compile a corpus into a small model that vLLM serves beside any base."""


@app.command()
def build(
    base: Annotated[str, typer.Option(help="Folder of the base model (Hugging Face).")],
    corpus: Annotated[Path, typer.Option(help=".txt, .jsonl, .parquet, or a folder of them.")],
    output: Annotated[Path, typer.Option(help="Folder for the artifacts; the memory is export/.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Text alpha is calibrated on; default: held-out documents.")
    ] = None,
) -> None:
    """Compile a corpus into a memory: corpus, datastore, index, targets, memory, export."""
    from vllm_memdec.train.pipeline import build as run

    progress = Progress()
    export = run(base, corpus, output, load_settings(config), validation, progress)
    progress.say(f"The memory is {export.path}. Serve it beside its base:")
    progress.say(
        f"vllm serve {base} --model-impl memdec --additional-config "
        f'\'{{"memdec": {{"model": "{export.path}"}}}}\''
    )


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error a user can mend, None for a defect of ours."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in str(error) or "PytorchStreamWriter failed" in str(error):
        return "the disk is full: free some space and run again, finished parts are kept."
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return None


def main() -> None:
    """Run the command; a user's error ends it with one sentence and exit code 1."""
    # Models are folders on this machine: nothing is looked up on a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        Progress().say("Stopped. Run the same command again to go on.")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        Progress().say(f"memdec: {sentence}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
