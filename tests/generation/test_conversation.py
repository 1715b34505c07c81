"""Conversations: a user and a model take turns, over one key/value cache."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import tiny_model

from open_mythos import KVCache
from open_mythos.generation.conversation import Conversation, Messages
from open_mythos.generation.sampling import Sampling
from open_mythos.nn.exits import PredictionKL
from open_mythos.tasks import english
from open_mythos.tasks.english import ID, VOCABULARY
from open_mythos.tasks.tokenizer import Tokenizer, WordLevel

GREEDY = Sampling(temperature=0)


def make_conversation(ends: bool = True, **options: Any) -> Conversation:
    model = tiny_model(vocab_size=257, max_seq_len=options.pop("max_seq_len", 128), halting=False)
    return Conversation(model, Tokenizer(ends), options.pop("n_loops", 3), options.pop("sampling", GREEDY), **options)


def without_cache(talk: Conversation, ids: list[int], n: int) -> list[int]:
    """Greedy tokens, each computed from the whole text."""
    for _ in range(n):
        logits = talk.model(torch.tensor([ids]), talk.n_loops)[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids


def encoded(text: str) -> list[int]:
    return Tokenizer().encode([text]).tolist()


@pytest.mark.parametrize("ends", [True, False])
def test_turns_at_changing_loops_equal_generation_without_a_cache(ends: bool) -> None:
    talk = make_conversation(ends)
    first = "".join(talk.reply("hello", 5))
    expected = without_cache(talk, [0] * ends + encoded("hello"), 5)
    assert talk.ids == expected and first == Tokenizer().decode(expected[-5:])
    talk.n_loops = 2
    list(talk.reply("and then", 4))
    assert talk.ids == without_cache(talk, expected + encoded("\nand then"), 4)
    talk.reset()
    assert list(talk.reply("hello", 0)) == [] and talk.ids == [0] * ends + encoded("hello")


def test_each_token_is_processed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, seen = make_conversation(), list[int]()
    embed = talk.model.embed
    embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    list(talk.reply("hello", 3))
    list(talk.reply("you", 3))
    assert seen == [6, 1, 1, 5, 1, 1], "second turn: the last token of the reply, a newline and three letters"


def test_an_end_token_stops_a_reply_and_is_not_part_of_it() -> None:
    talk = make_conversation()
    with torch.no_grad():
        talk.model.norm.weight.zero_()  # equal logits, so that the most likely token is 0, the end
    assert list(talk.reply("hello", 9)) == [] and talk.ids[-1] == encoded("o")[0]
    assert len(list(make_conversation(ends=False).reply("hello", 9))) <= 9


def test_replies_stream_whole_utf8_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = make_conversation()
    symbols = iter([1 + b for b in "né🎈".encode()] + [1 + 0xC3, 1 + 0x61, 1 + 0xF0])
    monkeypatch.setattr(
        talk, "_logits", lambda: torch.nn.functional.one_hot(torch.tensor([next(symbols)]), 257).float()
    )
    assert list(talk.reply("x", 10)) == ["n", "é", "🎈", "�a", "�"]


def test_a_conversation_continues_without_an_interrupted_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, calls = make_conversation(), [0]
    update = KVCache.slot

    def interrupted(self: KVCache, name: str) -> Any:
        calls[0] += 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        return update(self, name)

    monkeypatch.setattr(KVCache, "slot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(talk.reply("hello", 5))
    assert talk.ids == [] and talk.messages == []
    list(talk.reply("more", 3))
    assert talk.ids == without_cache(talk, [0, *encoded("more")], 3)


def test_an_interrupted_reply_leaves_the_last_one_to_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = make_conversation()
    list(talk.reply("hello", 3))

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(talk.reply("more", 3))
    assert talk.n_replied == 3


@pytest.mark.parametrize("ended_by", ["another message", "reset"])
def test_an_unread_reply_ends_where_the_next_turn_begins(ended_by: str) -> None:
    talk = make_conversation()
    first = talk.reply("hello", 9)
    said = next(first)
    if ended_by == "reset":
        talk.reset()
    list(talk.reply("more", 3))
    ids, contents = list(talk.ids), [message["content"] for message in talk.messages]
    assert list(first) == [] and talk.ids == ids and [message["content"] for message in talk.messages] == contents
    assert contents[:-1] == (["more"] if ended_by == "reset" else ["hello", said, "more"])


def test_a_long_conversation_drops_its_oldest_tokens() -> None:
    talk = make_conversation(max_seq_len=40)
    for turn in range(6):
        list(talk.reply(f"turn {turn}", 9))
        assert len(talk.ids) <= 41 and Tokenizer().decode(talk.ids[:-9]).endswith(f"turn {turn}")


@pytest.mark.parametrize("exit", [None, PredictionKL(1e-9)])
def test_a_trace_has_each_loops_top_token_and_its_probability(exit: Any) -> None:
    talk = make_conversation(exit=exit)
    with pytest.raises(ValueError, match="nothing to trace yet; say something first"):
        talk.trace()
    list(talk.reply("hello", 6))
    generated, loops = talk.trace(4)
    assert generated == talk.ids[-4:] and len(loops) == 3
    for loop, row in enumerate(loops):
        probabilities = talk.model(torch.tensor([talk.ids[:-1]]), loop + 1)[0, -4:].softmax(-1)
        assert [token for token, _ in row] == probabilities.argmax(-1).tolist()
        assert [p for _, p in row] == pytest.approx(probabilities.amax(-1).tolist(), abs=1e-5)
    assert [token for token, _ in loops[-1]] == generated, "greedy: the last loop's prediction is the generated token"
    assert len(talk.trace(99)[0]) == len(talk.ids) - 1


def test_a_chat_template_determines_the_prompt() -> None:
    seen: list[Messages] = []

    def template(messages: Messages) -> list[int]:
        seen.append([dict(message) for message in messages])
        return encoded("".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>")

    talk = make_conversation(template=template)
    first = "".join(talk.reply("hi", 3))
    assert talk.ids[:-3] == encoded("<user>hi<assistant>")
    list(talk.reply("ok", 2))
    assert seen[-1][1] == {"role": "assistant", "content": first} and seen[-1][2] == {"role": "user", "content": "ok"}
    assert talk.ids == without_cache(talk, template(seen[-1]), 2)


def test_a_tokenizer_of_another_vocabulary_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match="the tokenizer has 257 tokens and the model 23, so they do not belong together"
    ):
        Conversation(tiny_model(), Tokenizer())


def scripted(monkeypatch: pytest.MonkeyPatch, *words: tuple[str, float], ends: bool = True) -> Conversation:
    """A conversation in words whose model predicts these words, with these probabilities."""
    model, predictions = tiny_model(vocab_size=len(VOCABULARY), max_seq_len=128, halting=False), iter(words)
    talk = Conversation(model, WordLevel(VOCABULARY, ends), 3, GREEDY)

    def logits() -> torch.Tensor:
        word, probability = next(predictions)
        rest = (1 - probability) / (len(VOCABULARY) - 1)
        return torch.full((1, len(VOCABULARY)), rest).index_fill(1, torch.tensor([ID[word]]), probability).log()

    monkeypatch.setattr(talk, "_logits", logits)
    return talk


def test_a_question_is_answered_from_all_facts_until_an_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = scripted(monkeypatch, ("key", 0.9), ("<end>", 0.9), ("Ben", 0.4), ("5", 0.9), ("7", 0.9), ("8", 0.4))
    assert list(talk.reply("Ana has what Ben has.")) == [], "a fact is stored and gets no reply"
    assert "".join(talk.reply("Ben keeps a key. What does Ana have?")) == "key"
    assert talk.ids == english.encode("Ana has what Ben has . Ben keeps a key . what does Ana have ? key")
    assert "".join(talk.reply("Who is Ben?")) == "I am not sure: Ben"
    assert "".join(talk.reply("What has Ben?")) == "5 7 8", "an answer ends after a word that is not sure"
    assert talk.ids == english.encode("Ana has what Ben has . Ben keeps a key . what has Ben ? 5 7 8")
    generated, loops = talk.trace()
    assert generated == english.encode("5") and [len(row) for row in loops] == [1, 1, 1], "asked at the question mark"
    assert [row[0] for row in talk.trace(3)[1]] == [row[0] for row in loops]


def test_without_end_tokens_answers_are_one_word_and_a_lone_end_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "".join(scripted(monkeypatch, ("key", 0.9), ends=False).reply("what has Ana?")) == "key"
    talk = scripted(monkeypatch, ("<end>", 0.9))
    assert "".join(talk.reply("what has Ana?")) == "I am not sure: I have no answer"
    assert talk.trace()[0] == [ID["<end>"]], "asked at the question mark"


def test_an_answer_stops_when_a_word_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """As happens at fewer loops than a model needs to predict the end."""
    talk = scripted(monkeypatch, *[("C", 0.9)] * 9)
    assert "".join(talk.reply("what is C?")) == "C" and talk.ids[-1] == ID["C"] and talk.n_replied == 1


def test_unknown_words_and_unfinished_sentences_are_refused_and_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = scripted(monkeypatch, ("key", 0.9), ("<end>", 0.9))
    list(talk.reply("Ana has a key."))
    for text, message in (("Ana has a kay.", "'kay' here; the nearest is 'key'"), ("what has Ana", "with . or ?")):
        with pytest.raises(ValueError, match=re.escape(message)):
            list(talk.reply(text))
    assert "".join(talk.reply("what has Ana?")) == "key" and len(talk.messages) == 4
