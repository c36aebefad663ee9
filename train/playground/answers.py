"""One answer on the page: its tokens as they are written, and soon after what the three gave them.

The base, the memory alone and the mixture are three models of one server. One of them writes; while
it does, the other two are asked for the probabilities of what stands there, all that is new at a
time: the slower the server, the more tokens a question has.
"""

import asyncio
import logging
from bisect import bisect_right
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.evaluation.deciding import decided_by, share_of_memory
from vllm_memdec.train.evaluation.token_page import numbers, shade
from vllm_memdec.train.playground.vllm_server import (
    Choice,
    Likely,
    Models,
    ServedMemory,
    VllmServer,
    base_alone,
    memory_alone,
    mixture,
)

BASE, MEMORY, MIXTURE = "base", "memory", "mixture"
ALIKE = 0.02  # of a probability: in bfloat16 two runs of one model differ by this much
BOTH = "both alike"

Event = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What the page asks for."""

    prompt: str
    writes: str  # BASE or MIXTURE
    memory: ServedMemory
    alpha: float | None  # None: the memory's own
    tokens: int

    def weight(self, position: int, given: dict[str, float]) -> float | None:
        """Return the memory's weight after `position + 1` tokens; None if it cannot be told.

        given: what the three gave to the next token. A gate's weight is what makes them fit.
        """
        if self.writes == BASE or position >= self.memory.positions:
            return 0.0
        asked = self.memory.alpha if self.alpha is None else self.alpha
        if not self.memory.gate and not isinstance(asked, str):
            return asked
        if self.memory.by_context:
            starts, alphas = zip(*self.memory.by_context, strict=True)
            return alphas[bisect_right(starts, position) - 1]
        apart = given[MEMORY] - given[BASE]
        if abs(apart) <= ALIKE * max(given[MEMORY], given[BASE]):
            return None
        return min(max((given[MIXTURE] - given[BASE]) / apart, 0.0), 1.0)


def token_event(question: Question, position: int, likely: dict[str, Likely]) -> Event:
    """Return what the page shows of a token: numbers, who decided, and its colour."""
    if position >= question.memory.positions:  # the server answers with the base
        likely = likely | {MEMORY: Likely(0.0, "")}
    given = {name: each.probability for name, each in likely.items()}
    alpha = question.weight(position, given)
    share = 0.5 if alpha is None else share_of_memory(alpha, given[BASE], given[MEMORY])
    decided = BOTH if alpha is None else decided_by(share)
    return {
        **given,
        "alpha": alpha,
        "decided": decided,
        "shade": shade(share, given[question.writes]),
        "numbers": numbers(given[BASE], given[MEMORY], given[MIXTURE], decided),
        "says": {name: each.says for name, each in likely.items()},
    }


class Answer:
    """An answer while it is written; events() is all there is to call."""

    def __init__(self, server: VllmServer, models: Models, question: Question) -> None:
        self.server, self.question, self.limit = server, question, models.max_model_len
        self.choices: dict[str, Choice] = {
            BASE: base_alone(models),
            MEMORY: memory_alone(question.memory),
            MIXTURE: mixture(question.memory, question.alpha),
        }
        self.prompt: list[int] = []
        self.ids: list[int] = []  # of what is written
        self.own: list[Likely] = []  # what the writing model gave them
        self.ended = False
        self.news, self.queue = asyncio.Event(), asyncio.Queue[Event | None]()

    async def events(self) -> AsyncIterator[Event]:
        """Yield {at, text} of each token, {at, base, ...} of it later, {done}; or {error}."""
        running = asyncio.create_task(self._run())
        try:
            while (event := await self.queue.get()) is not None:
                yield event
            await running
        finally:  # the page has hung up: the server need not write on
            running.cancel()

    async def _run(self) -> None:
        judging = asyncio.create_task(self._judge())
        try:
            finish = await self._write()
            await judging
            self.queue.put_nowait({"done": finish})
        except MemdecError as error:
            self.queue.put_nowait({"error": str(error)})
        except Exception:
            logging.getLogger(__name__).exception("a defect ended an answer")
            defect = (
                "A defect of memdec ended this answer: the terminal of the playground shows it."
            )
            self.queue.put_nowait({"error": defect})
        finally:
            judging.cancel()
            self.queue.put_nowait(None)

    async def _write(self) -> str | None:
        finish, asked = None, self.question
        choice = self.choices[asked.writes]
        async for chunk in self.server.stream(choice, asked.prompt, asked.tokens):
            self.prompt, finish = self.prompt or chunk.prompt, chunk.finish or finish
            for token in chunk.tokens:
                self.queue.put_nowait({"at": len(self.ids), "text": token.text})
                self.ids.append(token.id)
                self.own.append(token.likely)
            self.news.set()
        self.ended = True
        self.news.set()
        return finish

    async def _judge(self) -> None:
        done, others = 0, [name for name in self.choices if name != self.question.writes]
        while True:
            ended, known = self.ended, len(self.prompt)
            # A server has no room to say one token more after as many as its models can read.
            end = min(len(self.ids), self.limit - 1 - known)
            if end > done:
                ids, start = [*self.prompt, *self.ids[:end]], known + done
                found = await asyncio.gather(
                    *(self.server.probabilities(self.choices[n], ids, start) for n in others)
                )
                for at, each in enumerate(zip(*found, strict=True), done):
                    likely = dict(zip(others, each, strict=True))
                    likely[self.question.writes] = self.own[at]
                    token = token_event(self.question, known + at - 1, likely)
                    self.queue.put_nowait({"at": at, **token})
                done = end
            elif ended:
                return
            else:
                await self.news.wait()
                self.news.clear()
