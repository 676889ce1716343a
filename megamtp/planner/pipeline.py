"""One step of a pipeline, pass by pass: the order of DeepSpeed's schedules, and the time that they take.

1. ``program`` writes down what a rank does: passes, and exchanges of messages that it waits for. The order is that of
   DeepSpeed's ``TrainSchedule`` (1f1b) and ``DualPipeVSchedule``; tests hold it against them.
2. ``simulate`` runs the programs of all ranks, given the seconds of every pass and message.

A message travels from when both of its ranks have come to it. A rank waits until all messages of an exchange have
arrived: neither schedule computes while it sends. Those of one exchange to the same rank share the link.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one stage."""

    kind: Literal["forward", "backward"]
    stage: int
    micro_batch: int


class Message(NamedTuple):
    """What the pass ``of`` made (the activation, or the gradient of its input), on its way to the stage ``to``."""

    of: Pass
    to: int


Exchange = tuple[Message, ...]
Instruction = Pass | Exchange


class Pipeline(NamedTuple):
    """Ranks, micro-batches of a step, and the schedule. DualPipeV has two stages a rank."""

    ranks: int
    micro_batches: int
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"

    @property
    def stages(self) -> int:
        return self.ranks * (2 if self.schedule == "dualpipev" else 1)

    def rank_of(self, stage: int) -> int:
        return min(stage, self.stages - 1 - stage) if self.schedule == "dualpipev" else stage

    def output(self, done: Pass) -> Message | None:
        """What another rank needs of a pass."""
        to = done.stage + (1 if done.kind == "forward" else -1)
        stays = not 0 <= to < self.stages or self.rank_of(to) == self.rank_of(done.stage)
        return None if stays else Message(done, to)

    def input(self, coming: Pass) -> Message | None:
        """What a pass needs of another rank."""
        source = coming.stage - (1 if coming.kind == "forward" else -1)
        if not 0 <= source < self.stages:
            return None
        return self.output(Pass(coming.kind, source, coming.micro_batch))


def program(pipeline: Pipeline, rank: int) -> list[Instruction]:
    """What ``rank`` does in one step. Raises ``ValueError`` for fewer micro-batches than DualPipeV needs."""
    if pipeline.schedule == "1f1b":
        return list(_one_forward_one_backward(pipeline, rank))
    if pipeline.micro_batches < 2 * pipeline.ranks:
        raise ValueError(f"dualpipev needs {2 * pipeline.ranks} micro-batches, got {pipeline.micro_batches}")
    return _dualpipev(pipeline, rank)


def _one_forward_one_backward(pipeline: Pipeline, stage: int) -> Iterator[Instruction]:
    count, lead = pipeline.micro_batches, pipeline.ranks - 1 - stage
    warm_up = min(lead, count)
    order = [Pass("forward", stage, i) for i in range(warm_up)]
    for i in range(count - warm_up):
        order += [Pass("forward", stage, warm_up + i), Pass("backward", stage, i)]
    order += [Pass("backward", stage, i) for i in range(count - warm_up, count)]

    yield from _exchanges(pipeline.input(order[0]))
    for done, coming in pairwise(order):
        yield done
        messages = [pipeline.output(done), pipeline.input(coming)]
        # In the steady state what comes is taken first. The neighbour does likewise, or both would wait for ever.
        if (done.kind, coming.kind) == ("forward", "backward") and done.micro_batch - coming.micro_batch == lead:
            messages.reverse()
        yield from _exchanges(*messages)
    yield order[-1]
    yield from _exchanges(pipeline.output(order[-1]))


def _exchanges(*messages: Message | None) -> Iterator[Exchange]:
    return ((message,) for message in messages if message)


@dataclass
class _Program:
    """A DualPipeV rank's instructions, being written. Messages collect until an exchange takes them all."""

    pipeline: Pipeline
    rank: int
    instructions: list[Instruction] = field(default_factory=list)
    waiting: list[Message] = field(default_factory=list)
    numbers: dict[tuple[str, str, int], int] = field(default_factory=dict)  # micro-batches done, by purpose

    def next(self, purpose: str, kind: str, leg: int) -> Pass:
        number = self.numbers.get((purpose, kind, leg), 0)
        self.numbers[purpose, kind, leg] = number + 1
        stage = self.rank if leg == 0 else self.pipeline.stages - 1 - self.rank
        return Pass({"F": "forward", "B": "backward"}[kind], stage, number)

    def queue(self, message: Message | None) -> None:
        if message:
            self.waiting.append(message)

    def receive(self, kind: str, leg: int) -> None:
        self.queue(self.pipeline.input(self.next("receive", kind, leg)))

    def send(self, kind: str, leg: int) -> None:
        self.queue(self.pipeline.output(self.next("send", kind, leg)))

    def exchange(self) -> None:
        if self.waiting:
            self.instructions.append(tuple(self.waiting))
            self.waiting = []

    def compute(self, *passes: tuple[str, int]) -> None:
        self.exchange()
        self.instructions += [self.next("compute", *each) for each in passes]

    def run(self, *passes: tuple[str, int]) -> None:
        """Receive for the passes, run them, and send what they made (with the next exchange)."""
        for each in passes:
            self.receive(*each)
        self.compute(*passes)
        for each in passes:
            self.send(*each)


def _dualpipev(pipeline: Pipeline, rank: int) -> list[Instruction]:
    """DeepSeek-V3's DualPipeV without its deferred weight gradients; leg 0 goes out, leg 1 comes back."""
    later, is_last = pipeline.ranks - 1 - rank, rank == pipeline.ranks - 1
    f0, f1, b0, b1 = ("F", 0), ("F", 1), ("B", 0), ("B", 1)
    p = _Program(pipeline, rank)
    for _ in range(2 * later):
        p.run(f0)
    p.receive(*f0)
    for i in range(rank + 1):
        p.compute(f0)
        p.receive(*f0)  # of the next one, while the first leg's output waits for the second leg
        p.receive(*f1)
        p.compute(f1)
        if not (is_last and i == rank):
            p.send(*f1)
        p.send(*f0)
    for _ in range(later):
        p.run(b1)
        p.run(f1)
    for i in range(pipeline.micro_batches - 2 * pipeline.ranks + rank + 1):
        if i > 0:
            p.run(f0, b1)
        elif is_last:
            p.compute(f0)
            p.send(*f1)
            p.receive(*b1)
            p.compute(b1)
            p.send(*f0)
            p.send(*b1)
        else:
            p.receive(*b1)
            p.compute(f0, b1)
            p.send(*f0)
            p.send(*b1)
        p.run(f1, b0)
    for _ in range(later):
        p.run(b1)
        p.run(f1, b0)
    for _ in range(rank + 1):
        p.run(b1)
        p.run(b0)
    for _ in range(later):
        p.exchange()  # where the deferred weight gradients would be
        p.run(b0)
    p.exchange()
    return p.instructions


class Event(NamedTuple):
    """What a rank did from ``begin`` to ``end``, in seconds from the step's start. A message is its sender's."""

    rank: int
    what: Pass | Message
    begin: float
    end: float


def simulate(
    pipeline: Pipeline, pass_seconds: Callable[[Pass], float], message_seconds: Callable[[Message], float]
) -> list[Event]:
    """All passes and messages of a step, by rank and then by time.

    Raises ``RuntimeError`` where ranks wait for each other for ever.
    """
    programs = [program(pipeline, rank) for rank in range(pipeline.ranks)]
    at, now = [0] * pipeline.ranks, [0.0] * pipeline.ranks
    arrivals: dict[Message, dict[int, float]] = {}  # when each of its two ranks came to a message
    sharing: dict[Message, int] = {}  # messages on the same link at a time
    events: list[list[Event]] = [[] for _ in programs]

    def arrive(rank: int, exchange: Exchange) -> None:
        sent = [message for message in exchange if pipeline.rank_of(message.of.stage) == rank]
        for message in exchange:
            arrivals.setdefault(message, {})[rank] = now[rank]
        for message in sent:
            sharing[message] = sum(pipeline.rank_of(other.to) == pipeline.rank_of(message.to) for other in sent)

    def run(rank: int) -> set[int]:
        """As far as it gets; the ranks that may have waited for it."""
        met = set()
        while at[rank] < len(programs[rank]):
            step = programs[rank][at[rank]]
            if isinstance(step, Pass):
                begin, now[rank] = now[rank], now[rank] + pass_seconds(step)
                events[rank].append(Event(rank, step, begin, now[rank]))
            else:
                if rank not in arrivals.get(step[0], {}):
                    arrive(rank, step)
                    met |= {pipeline.rank_of(stage) for message in step for stage in (message.of.stage, message.to)}
                if any(len(arrivals[message]) < 2 for message in step):
                    break
                for message in step:
                    begin = max(arrivals[message].values())
                    end = begin + message_seconds(message) * sharing[message]
                    now[rank] = max(now[rank], end)
                    if pipeline.rank_of(message.of.stage) == rank:
                        events[rank].append(Event(rank, message, begin, end))
            at[rank] += 1
        return met - {rank}

    ready = deque(range(pipeline.ranks))
    while ready:
        ready.extend(run(ready.popleft()))
    if any(at[rank] < len(steps) for rank, steps in enumerate(programs)):
        raise RuntimeError(f"the ranks of {pipeline} wait for each other for ever")
    return [event for of_rank in events for event in of_rank]
