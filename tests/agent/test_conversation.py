"""Who speaks when: one transition after the other."""

from __future__ import annotations

import pytest

from agent.conversation import (
    Action,
    Answer,
    Begin,
    BeginTyped,
    Close,
    Discard,
    DropOverlap,
    Duck,
    Forget,
    Prepare,
    State,
    Stop,
    TurnTaking,
)
from agent.schema import TurnsConfig

MS = 16  # samples


class Talk(TurnTaking):
    """A conversation with its log; time passes only when it is told to."""

    def __init__(self, **settings: object) -> None:
        self.moves: list[str] = []
        super().__init__(
            TurnsConfig.model_validate({"barge_in_ms": 400, **settings}),
            min_speech=160 * MS,
            moved=lambda state, reason, sample: self.moves.append(state.value),
        )

    def to_answering(self) -> Talk:
        """A turn, up to the answer."""
        self.started(0, 0.0)
        self.silence(1.0)
        self.ended(1.5)
        return self

    def overlap(self, at: int = 50_000) -> list[Action]:
        """The reply is being heard and somebody speaks."""
        self.played(1000, False, 2.0)
        return self.started(at, 2.0)


def test_a_turn_from_speech_to_the_end_of_its_answer() -> None:
    talk = Talk()
    assert talk.started(0, 0.0) == [Begin(1)]
    assert talk.silence(1.0) == [Prepare(1)]
    assert talk.ended(1.5) == [Answer(1)]
    assert talk.played(500, False, 2.0) == []
    assert talk.played(900, True, 3.0) == [Close(1)]
    assert talk.moves == ["hearing", "maybe-finished", "answering", "listening"]


def test_without_speculation_the_reply_is_made_at_the_endpoint() -> None:
    talk = Talk(speculate=False)
    talk.started(0, 0.0)
    assert talk.silence(1.0) == []
    assert talk.ended(1.5) == [Prepare(1), Answer(1)]


def test_speech_that_goes_on_refutes_what_was_prepared() -> None:
    talk = Talk()
    talk.started(0, 0.0)
    talk.silence(1.0)
    assert talk.resumed(20_000, 1.2) == [Discard(1)]
    assert talk.state is State.HEARING
    assert talk.silence(2.0) == [Prepare(1)], "and the next silence prepares anew"


def test_an_utterance_cut_at_its_longest_is_answered() -> None:
    talk = Talk()
    talk.started(0, 0.0)
    assert talk.ended(30.0) == [Prepare(1), Answer(1)]


def test_who_goes_on_before_a_sound_of_the_reply_has_not_finished() -> None:
    talk = Talk().to_answering()
    assert talk.started(30_000, 1.6) == [Discard(1)]
    assert (talk.state, talk.turn) == (State.HEARING, 1)


def test_a_cough_ducks_the_reply_and_lets_it_go_on() -> None:
    talk = Talk().to_answering()
    assert talk.overlap() == [Duck(True)]
    assert talk.audio(50_000 + 200 * MS, 2.2) == []
    assert talk.silence(2.3) == [Duck(False)]
    assert talk.ended(2.6) == [Duck(False), DropOverlap()]
    assert talk.played(5000, True, 3.0) == [Close(1)]
    assert (talk.state, talk.turn) == (State.LISTENING, 1)


def test_speech_over_the_reply_interrupts_it_and_is_the_next_turn() -> None:
    talk = Talk().to_answering()
    talk.overlap(50_000)
    assert talk.audio(50_000 + 239 * MS, 2.2) == [], "240 ms more than the VAD needed: 400 in all"
    assert talk.audio(50_000 + 240 * MS, 2.3) == [Stop(1, "barge-in"), Begin(2, over=True)]
    assert (talk.state, talk.turn) == (State.HEARING, 2)


def test_a_second_burst_is_measured_by_itself() -> None:
    talk = Talk().to_answering()
    talk.overlap(50_000)
    talk.silence(2.3)
    assert talk.resumed(60_000, 2.5) == [Duck(True)]
    assert talk.audio(60_000 + 200 * MS, 2.6) == []
    assert talk.audio(60_000 + 240 * MS, 2.7)[0] == Stop(1, "barge-in")


def test_speech_still_going_on_when_the_reply_ends_is_a_turn() -> None:
    talk = Talk().to_answering()
    talk.overlap()
    assert talk.played(5000, True, 2.2) == [Close(1), Begin(2, over=True)]


def test_a_pause_across_the_end_of_the_reply_does_not_lose_the_speech_before_it() -> None:
    talk = Talk().to_answering()
    talk.overlap()
    talk.silence(2.2)
    assert talk.played(5000, True, 2.3) == [Close(1)]
    assert talk.resumed(60_000, 2.4) == [Begin(2, over=True)]


@pytest.mark.parametrize("prepared", [True, False])
def test_an_interruption_from_outside_ends_the_turn(prepared: bool) -> None:
    talk = Talk(speculate=prepared)
    assert talk.interrupt("mute", 0.0) == [], "there is no turn"
    talk.started(0, 0.0)
    talk.silence(1.0)
    forget = Forget(1, "mute")
    assert talk.interrupt("mute", 1.1) == ([Discard(1), forget] if prepared else [forget])
    assert talk.to_answering().interrupt("mute", 3.0) == [Stop(2, "mute")]


def test_a_lost_microphone_forgets_half_a_request_and_a_lost_loudspeaker_stops_a_reply() -> None:
    talk = Talk()
    talk.started(0, 0.0)
    assert talk.microphone_lost(0.5) == [Forget(1, "the microphone went away")]
    talk.to_answering()
    assert talk.microphone_lost(2.0) == [], "the answer is still wanted"
    assert talk.loudspeaker_lost(2.1) == [Stop(2, "the loudspeaker went away")]
    assert talk.loudspeaker_lost(2.2) == []


def test_nothing_lasts_while_nothing_moves() -> None:
    talk = Talk(stall_seconds=5.0)
    talk.started(0, 0.0)
    talk.audio(1000, 4.0)
    assert talk.tick(8.9) == [], "audio came five seconds ago or less"
    assert talk.tick(9.0) == [Forget(1, "nothing moved for 5 s")]
    talk = Talk(stall_seconds=5.0).to_answering()
    talk.working(6.0)
    assert talk.tick(10.9) == []
    assert talk.tick(11.0) == [Stop(1, "nothing moved for 5 s")]
    assert talk.tick(99.0) == []


def test_what_makes_no_sense_in_a_state_changes_nothing() -> None:
    talk = Talk()
    assert [talk.silence(0.0), talk.resumed(0, 0.0), talk.ended(0.0)] == [[], [], []]
    assert [talk.played(5, True, 0.0), talk.tick(1e9)] == [[], []]
    assert talk.moves == []
    with pytest.raises(AssertionError, match="no way from listening to maybe-finished"):
        talk._move(State.MAYBE_FINISHED, "a mistake in the program", 0.0)


def test_a_typed_request_is_answered_at_once_and_waits_while_somebody_speaks() -> None:
    talk = Talk()
    assert talk.typed(0.0) == [BeginTyped(1), Prepare(1), Answer(1)]
    assert talk.typed(0.1) == []
    assert talk.played(900, True, 1.0) == [Close(1)]
    talk.started(0, 2.0)
    assert talk.typed(2.1) == []
    assert talk.moves == ["answering", "listening", "hearing"]


def test_speech_before_a_sound_of_the_reply_to_a_typed_request_is_another_turn() -> None:
    talk = Talk()
    talk.typed(0.0)
    assert talk.started(5_000, 0.1) == [Duck(True)]
    assert talk.audio(50_000, 0.5) == [Stop(1, "barge-in"), Begin(2, over=True)]
