"""Several streams in one: each gets what it would get alone, whatever the others do."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stages.llama_weights import LlamaConfig, random_llama
from stages.lm import LanguageModel, Sampling
from stages.lm_batch import SharedDecoder, StreamsTakenError
from stages.lm_torch import TorchEngine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = 150
SHAPE = LlamaConfig(
    vocab_size=61,
    hidden=32,
    intermediate=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=256,
)
WEIGHTS = random_llama(SHAPE, DEVICE, torch.float32, seed=1)
GREEDY = Sampling(greedy=True)
LONG = 60.0  # seconds; no test waits for that


@pytest.fixture
def shared() -> Iterator[SharedDecoder]:
    with SharedDecoder(SHAPE, WEIGHTS, CAPACITY, streams=4) as decoder:
        yield decoder


def stream(decoder: SharedDecoder) -> LanguageModel:
    return LanguageModel(SHAPE, WEIGHTS, CAPACITY, decoder.stream())


def alone() -> LanguageModel:
    return LanguageModel(SHAPE, WEIGHTS, CAPACITY, TorchEngine(SHAPE, WEIGHTS, CAPACITY))


def conversation(lm: LanguageModel, seed: int) -> list[int]:
    """A script that ``seed`` determines; every token that was decoded in it."""
    chance = random.Random(seed)
    sampling = chance.choice([GREEDY, Sampling(seed=seed), Sampling(1.5, 0.7, seed, top_k=9)])
    mask = torch.arange(SHAPE.vocab_size) % chance.choice([2, 3]) == 0 if seed % 2 else None
    said: list[int] = []
    for _ in range(chance.randint(3, 6)):
        count = min(chance.randint(1, 20), lm.capacity - lm.length - 12)
        lm.append([chance.randrange(SHAPE.vocab_size) for _ in range(count)])
        said += [lm.decode(sampling, mask) for _ in range(chance.randint(1, 12))]
        lm.rewind(lm.length - chance.randint(0, 5))
    return said


def test_streams_that_join_and_leave_get_what_they_would_get_alone(shared: SharedDecoder) -> None:
    def whole(seed: int) -> tuple[list[int], torch.Tensor]:
        lm = stream(shared)
        try:
            return conversation(lm, seed), lm.logits
        finally:
            lm.close()

    with ThreadPoolExecutor(max_workers=4) as threads:
        results = list(threads.map(whole, range(16)))
    for seed, (said, logits) in enumerate(results):
        lm = alone()
        assert said == conversation(lm, seed)
        torch.testing.assert_close(logits, lm.logits, atol=1e-4, rtol=0)
    assert sum(shared.steps.values()) > 0


def test_streams_that_decode_at_the_same_time_share_their_steps() -> None:
    with SharedDecoder(SHAPE, WEIGHTS, CAPACITY, streams=2, wait_s=LONG) as decoder:
        first, second = stream(decoder), stream(decoder)
        for lm in (first, second):
            lm.append([1, 2, 3])
            lm.decode(GREEDY)  # from the logits that are there
        first.decode(GREEDY)  # alone; from now on its next token is waited for
        with ThreadPoolExecutor() as threads:
            other = threads.submit(decode, second, 9)
            until_waiting(decoder)
            expected = decode(first, 9)
            assert len(expected) == len(other.result()) == 9
        assert decoder.steps == {1: 1, 2: 9}


def until_waiting(decoder: SharedDecoder) -> None:
    """Until a stream waits for others."""
    with decoder._news:
        assert decoder._news.wait_for(lambda: decoder._waiting, timeout=LONG)


def decode(lm: LanguageModel, count: int) -> list[int]:
    return [lm.decode(GREEDY) for _ in range(count)]


def test_nobody_waits_for_a_stream_that_has_gone_on_to_something_else() -> None:
    with SharedDecoder(SHAPE, WEIGHTS, CAPACITY, streams=3, wait_s=LONG) as decoder:
        busy, reading, gone = (stream(decoder) for _ in range(3))
        for lm in (busy, reading, gone):
            lm.append([1, 2])
            lm.decode(GREEDY)
        busy.decode(GREEDY)
        with ThreadPoolExecutor() as threads:
            for lm, others in ((reading, [busy]), (gone, [busy, reading])):
                first = threads.submit(lm.decode, GREEDY)
                until_waiting(decoder)
                for step in [threads.submit(other.decode, GREEDY) for other in others]:
                    step.result()
                first.result()
        reading.append([5, 6, 7])
        gone.close()
        busy.decode(GREEDY)
        assert decoder.steps == {1: 2, 2: 1, 3: 1}


def test_a_stream_that_does_not_come_is_waited_for_once(shared: SharedDecoder) -> None:
    absent, present = stream(shared), stream(shared)
    for lm in (absent, present):
        lm.append([1, 2])
        decode(lm, 2)
    expected = alone()
    expected.append([1, 2])
    assert present.ids == (1, 2, *decode(expected, 2))
    assert decode(present, 5) == decode(expected, 5)
    assert set(shared.steps) == {1}


def test_there_are_as_many_streams_as_were_asked_for(shared: SharedDecoder) -> None:
    lms = [stream(shared) for _ in range(3)]
    lms.append(lms[0].another())
    with pytest.raises(StreamsTakenError, match="all 4 streams are in use"):
        lms[0].another()
    lms[2].append([1, 2, 3])
    lms[2].close()
    lms[2].close()
    again = lms[0].another()
    again.append([9])
    expected = alone()
    expected.append([9])
    torch.testing.assert_close(again.logits, expected.logits, atol=1e-4, rtol=0)


def test_a_stream_that_is_dropped_gives_its_place_back(shared: SharedDecoder) -> None:
    lms = [stream(shared) for _ in range(4)]
    lms.pop()
    assert stream(shared).length == 0


def test_an_impossible_mask_is_the_fault_of_one_stream_only() -> None:
    with SharedDecoder(SHAPE, WEIGHTS, CAPACITY, streams=2, wait_s=LONG) as decoder:
        good, bad = stream(decoder), stream(decoder)
        for lm in (good, bad):
            lm.append([4])
            lm.decode(GREEDY)
        good.decode(GREEDY)
        with ThreadPoolExecutor() as threads:
            nothing = torch.zeros(SHAPE.vocab_size, dtype=torch.bool)
            waiting = threads.submit(bad.decode, GREEDY, nothing)
            until_waiting(decoder)
            good.decode(GREEDY)
            error = waiting.exception()
        assert isinstance(error, ValueError) and "allows no token" in str(error)
        expected = alone()
        expected.append([4])
        assert good.ids == (4, *decode(expected, 3))


def test_closing_ends_the_waiting() -> None:
    decoder = SharedDecoder(SHAPE, WEIGHTS, CAPACITY, streams=2, wait_s=LONG)
    first, second = stream(decoder), stream(decoder)
    for lm in (first, second):
        lm.append([4])
        lm.decode(GREEDY)
    first.decode(GREEDY)  # the next step waits for this stream
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            second.decode(GREEDY)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until_waiting(decoder)
    decoder.close()
    thread.join()
    assert "closed" in str(errors[0])
    with pytest.raises(RuntimeError, match="closed: load the model again"):
        first.decode(GREEDY)
    with pytest.raises(StreamsTakenError, match="closed"):
        decoder.stream()
