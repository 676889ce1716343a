import itertools
import random
from fractions import Fraction

import pytest

from megamtp.planner.pipeline import Message, Pass, Pipeline, program, simulate

PIPELINES = [
    *(Pipeline(ranks, count) for ranks in range(1, 6) for count in (1, 2, 3, 5, 8, 13)),
    *(Pipeline(ranks, 2 * ranks + more, "dualpipev") for ranks in range(2, 6) for more in (0, 1, 5)),
]


def deepspeeds(pipeline: Pipeline, rank: int) -> list:
    """DeepSpeed's own schedule in the planner's words."""
    from deepspeed.runtime.pipe import schedule

    dualpipev = pipeline.schedule == "dualpipev"
    kind = schedule.DualPipeVSchedule if dualpipev else schedule.TrainSchedule
    instructions, queued, numbers = [], [], {}
    for command in itertools.chain(*kind(pipeline.micro_batches, pipeline.ranks, rank).steps()):
        if command.name in ("LoadMicroBatch", "ReduceTiedGrads", "ReduceGrads", "OptimizerStep"):
            continue
        if command.name == "CommitP2P":
            instructions += [tuple(queued)] if queued else []
            queued = []
            continue
        phase = getattr(command, "phase", 0)
        stage = pipeline.stages - 1 - rank if phase else rank
        number = numbers.get((command.name, phase), 0)
        numbers[command.name, phase] = number + 1
        buffers = max(2, min(pipeline.ranks - rank, pipeline.micro_batches))
        assert command.buffer_id == (phase * pipeline.micro_batches + number if dualpipev else number % buffers)
        if command.name in ("ForwardPass", "BackwardPass"):
            instructions.append(Pass(command.name.removesuffix("Pass").lower(), stage, number))
            continue
        message = {
            "SendActivation": Message(Pass("forward", stage, number), stage + 1),
            "RecvActivation": Message(Pass("forward", stage - 1, number), stage),
            "SendGrad": Message(Pass("backward", stage, number), stage - 1),
            "RecvGrad": Message(Pass("backward", stage + 1, number), stage),
        }[command.name]
        if dualpipev:
            queued.append(message)
        else:
            instructions.append((message,))
    assert not queued
    return instructions


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_order_is_deepspeeds(pipeline):
    for rank in range(pipeline.ranks):
        assert program(pipeline, rank) == deepspeeds(pipeline, rank)


def ticks(pipeline: Pipeline, pass_ticks, message_ticks) -> dict:
    """A simulation of another kind: a clock that ticks, each rank a queue of instructions, each message a counter.

    (when a pass ended by (kind, stage, micro-batch)).
    """
    queues = [deepspeeds(pipeline, rank) for rank in range(pipeline.ranks)]
    left = [None] * pipeline.ranks  # ticks of the pass that a rank runs; the messages that its exchange waits for
    sent, ended, clock = {}, {}, 0

    def begin(rank):
        if not queues[rank]:
            return
        step = queues[rank][0]
        if isinstance(step, Pass):
            left[rank] = pass_ticks(step)
            return
        left[rank] = list(step)
        mine = [message for message in step if pipeline.rank_of(message.of.stage) == rank]
        for message in step:
            state = sent.setdefault(message, {"ends": 0, "left": message_ticks(message)})
            state["ends"] += 1
            if message in mine:
                to = pipeline.rank_of(message.to)
                state["left"] *= sum(pipeline.rank_of(other.to) == to for other in mine)

    for rank in range(pipeline.ranks):
        begin(rank)
    while any(queues):
        progress = True
        while progress:  # what ends at this tick, and whatever takes no time at all
            progress = False
            for rank in range(pipeline.ranks):
                if not queues[rank]:
                    continue
                step = queues[rank][0]
                if isinstance(step, Pass):
                    done = left[rank] == 0
                else:
                    done = all(sent[message]["ends"] == 2 and sent[message]["left"] == 0 for message in step)
                if done:
                    if isinstance(step, Pass):
                        ended[step] = clock
                    queues[rank].pop(0)
                    begin(rank)
                    progress = True
        for rank in range(pipeline.ranks):
            if queues[rank] and isinstance(queues[rank][0], Pass):
                left[rank] -= 1
        for state in sent.values():
            if state["ends"] == 2 and state["left"]:
                state["left"] -= 1
        clock += 1
        assert clock < 100_000
    return ended


@pytest.mark.parametrize("pipeline", [p for p in PIPELINES if 1 < p.ranks < 5 and p.micro_batches < 12], ids=str)
def test_simulation_against_a_ticking_clock(pipeline):
    source = random.Random(str(pipeline))
    passes = {(kind, stage): source.randint(0, 9) for kind in ("forward", "backward") for stage in range(20)}
    messages = {kind: source.randint(0, 4) for kind in ("forward", "backward")}

    def of_pass(each):
        return passes[each.kind, each.stage]

    def of_message(message):
        return messages[message.of.kind]

    events = simulate(pipeline, of_pass, of_message)
    ends = {event.what: event.end for event in events if isinstance(event.what, Pass)}
    assert ends == ticks(pipeline, of_pass, of_message)


def length(pipeline, forward, backward, message=0):
    def seconds(each):
        return forward if each.kind == "forward" else backward

    return max(event.end for event in simulate(pipeline, seconds, lambda _: message))


@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2), (3, 1), (0, 1)])
def test_bubble_of_equal_stages_is_the_formula(forward, backward):
    for ranks, count in itertools.product((1, 2, 3, 4, 7), (1, 2, 4, 9, 16)):
        busy = count * (forward + backward)
        total = Fraction(length(Pipeline(ranks, count), forward, backward))
        assert 1 - Fraction(busy) / total == Fraction(ranks - 1, count + ranks - 1)


def test_dualpipev_idles_less():
    for ranks in (2, 4, 8):
        half = length(Pipeline(ranks, 4 * ranks, "dualpipev"), 1, 2)  # each of its stages is half as large
        assert half < length(Pipeline(ranks, 4 * ranks), 2, 4)


def test_slower_is_never_faster():
    source = random.Random(0)

    def total(pipeline, times, message):
        events = simulate(pipeline, lambda each: times[each.kind, each.stage], lambda _: message)
        return max(event.end for event in events)

    for pipeline in (Pipeline(4, 6), Pipeline(3, 7, "dualpipev")):
        times = {(k, s): source.random() for k in ("forward", "backward") for s in range(pipeline.stages)}
        base = total(pipeline, times, 0.1)
        assert total(pipeline, times, 0.2) >= base
        for key in times:
            assert total(pipeline, times | {key: times[key] + 0.3}, 0.1) >= base


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_what_a_pass_needs_is_there(pipeline):
    """Independent of the order: every pass once, after what it reads, and no rank in two passes at a time."""
    events = simulate(pipeline, lambda each: 2 if each.kind == "forward" else 3, lambda _: 1)
    ends = {event.what: event.end for event in events}
    passes = [event for event in events if isinstance(event.what, Pass)]
    last = pipeline.stages - 1
    assert len(passes) == len({event.what for event in passes}) == 2 * pipeline.stages * pipeline.micro_batches
    for event in passes:
        kind, stage, number = event.what
        if kind == "forward" and stage > 0:
            source = Pass("forward", stage - 1, number)
        elif kind == "backward":
            source = Pass("backward", stage + 1, number) if stage < last else Pass("forward", stage, number)
        else:
            continue
        stays = pipeline.rank_of(source.stage) == event.rank
        assert event.begin >= ends[source if stays else Message(source, stage)]
    for rank in range(pipeline.ranks):
        own = [event for event in passes if event.rank == rank]
        assert all(earlier.end <= later.begin for earlier, later in itertools.pairwise(own))


def test_too_few_micro_batches_for_dualpipev():
    with pytest.raises(ValueError, match="needs 4 micro-batches, got 3"):
        simulate(Pipeline(2, 3, "dualpipev"), lambda _: 1, lambda _: 0)
