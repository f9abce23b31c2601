from __future__ import annotations

from dataclasses import replace

import pytest

from perfit_shared.retrieval import Retriever, entry_text, read_after
from perfit_shared.tasks import TASKS

TEXTS = ("The cat sat on the mat", "a dog ran", "The DOG sat; it was late", "...", "")


@pytest.mark.parametrize(
    ("query", "k", "found"),
    [
        ("dog sat", 1, [2]),  # both words, in whatever case
        ("mat, cat", 2, [0, 4]),  # then one without a common word, the latest
        ("zebra", 2, [4, 3]),
        ("", 2, [4, 3]),
        ("dog", 99, [1, 2, 4, 3, 0]),  # the shorter text is nearer
        ("dog", 0, []),
    ],
)
def test_the_nearest_come_first(query: str, k: int, found: list[int]) -> None:
    assert Retriever(TEXTS).best(query, k) == found


@pytest.mark.parametrize("texts", [(), ("",), ("...", "!")])
def test_nothing_to_compare(texts: tuple[str, ...]) -> None:
    assert Retriever(texts).best("dog", 5) == list(reversed(range(len(texts))))


@pytest.mark.parametrize(
    ("task", "item", "words", "line"),
    [
        (
            "scholarly_title",
            {"title": "On rain", "abstract": "It rains."},
            9,
            "abstract: It rains. title: On rain",
        ),
        (
            "news_headline",
            {"title": "Rain", "text": "It  rained\nall day."},
            2,
            "article: It rained title: Rain",
        ),
        ("product_rating", {"score": "4", "text": "Fine."}, 9, "review: Fine. score: 4"),
        ("commit_message", {"changes": "a.py", "message": "Add a"}, 9, "changes: a.py message: Add a"),
    ],
)
def test_an_entry_is_one_line_with_the_answer_last(
    task: str, item: dict[str, str], words: int, line: str
) -> None:
    assert entry_text(TASKS[task], item, words=words) == line


def test_examples_are_turns_of_a_chat_and_lines_of_a_text() -> None:
    """Nearest first in lines, nearest last in turns; a system turn stays the first."""
    near, far, asked = ({"changes": f"{x}.py", "message": f"Add {x}"} for x in "abc")
    plain = TASKS["commit_message"].resolved(False)
    prompt = plain.prompt(asked)
    lines = ["changes: a.py message: Add a", "changes: b.py message: Add b", prompt]
    assert read_after(plain, [near, far], asked) == "\n".join(lines)
    assert read_after(plain, [], asked) == prompt
    chat = replace(TASKS["commit_message"].resolved(True), system="Write.")
    said = [
        ("system", "Write."),
        *(("user", chat.prompt(far)), ("assistant", "Add b")),
        *(("user", chat.prompt(near)), ("assistant", "Add a")),
        ("user", chat.prompt(asked)),
    ]
    assert read_after(chat, [near, far], asked) == said
    assert read_after(chat, [], asked) == [said[0], said[-1]]
    other = replace(chat, name="other", template="Say what changed in {changes}", answer="Did: {message}")
    behind = [("user", "Say what changed in a.py"), ("assistant", "Did: Add a")]
    assert read_after(chat, [near], asked, of=other) == [said[0], *behind, said[-1]], "of another task"


def test_a_long_example_is_cut_and_its_reply_is_not() -> None:
    chat = TASKS["commit_message"].resolved(True)
    words = "word " * 1000
    example = {"changes": words, "message": words}
    asked = {"changes": words, "message": "x"}
    (_, question), (_, reply), (_, own) = read_after(chat, [example], asked)
    assert (len(question.split()), len(reply.split()), len(own.split())) == (
        len(chat.prompt(example, cut=True).split()),
        1000,
        len(chat.prompt(asked).split()),
    )
    assert len(question.split()) < len(own.split())
