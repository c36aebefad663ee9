"""How a command ends that fails: with one sentence where its user can mend it, else a traceback."""

import contextlib
import signal
import traceback
from collections.abc import Iterator
from contextvars import ContextVar

import typer

from vllm_memdec.train.faults import sentence_of
from vllm_memdec.train.progress import Progress

DEBUG = ContextVar("debug", default=False)  # whether errors that users can mend show a traceback
DEFECT = (
    "memdec: this is a defect of memdec or of a library it uses, not of your input. Please report "
    "it: the lines above, the command, and the output of `pip list`."
)


@contextlib.contextmanager
def explained(progress: Progress) -> Iterator[None]:
    """End the command with one sentence for an error a user can mend; defects keep their traceback.

    With --debug, both show one.
    """
    try:
        yield
    except KeyboardInterrupt:
        progress.say("Stopped. Run the same command again to go on.")
        raise typer.Exit(128 + signal.SIGINT) from None
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            error.add_note(DEFECT)  # Python prints notes at the end
            raise
        if DEBUG.get():
            error.__suppress_context__ = False  # what a library said as well
            traceback.print_exc()
        progress.say(f"memdec: {sentence}")
        raise typer.Exit(1) from None
