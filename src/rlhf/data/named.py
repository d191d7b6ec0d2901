"""Formats of published data sets, by the fields that their files have.

Instructions and questions get the section headings of Alpaca's template (`instruction_prompt`), so that a model tuned on
one of these sets is asked in the same words by another. Prompts that a set writes out in full are kept as they are.
"""

from collections.abc import Iterator
from itertools import combinations, groupby
from typing import Any

from rlhf.data.files import Item
from rlhf.data.formats import Canonical, has, has_texts, register
from rlhf.data.records import Fields, Nothing, Problem, choice_at, dotted, list_at, number_at, shown, text_at, value_at

INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:\n"


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Alpaca's sections without its preamble; a blank `context` has no section. The completion follows at once."""
    given = f"{INPUT}{context}\n\n" if context.strip() else ""
    return f"{INSTRUCTION}{instruction}\n\n{given}{RESPONSE}"


def _asked(record: Fields, instruction: str, context: str) -> str:
    """The prompt from two fields of a record, of which the second may be blank or absent."""
    given = "" if record.get(context) is None else text_at(record, context, blank=True)
    return instruction_prompt(text_at(record, instruction), given)


# Instructions with answers


@register("self-instruct", "demonstrations", has("instruction", "instances"))
def self_instruct(record: Fields) -> list[Canonical]:
    """Seed tasks (self-instruct, BELLE, user-oriented instructions): one demonstration for each instance."""
    instances = list_at(record, "instances")
    if not instances:
        raise Problem("field 'instances' has no entries; fill it in or remove the record")
    instruction = text_at(record, "instruction")
    return [
        {
            "prompt": instruction_prompt(instruction, text_at(record, "instances", position, "input", blank=True)),
            "completion": text_at(record, "instances", position, "output"),
        }
        for position in range(len(instances))
    ]


@register("alpaca", "demonstrations", has("instruction", "output"))
def alpaca(record: Fields) -> list[Canonical]:
    return [{"prompt": _asked(record, "instruction", "input"), "completion": text_at(record, "output")}]


@register("dolly", "demonstrations", has("instruction", "response"))
def dolly(record: Fields) -> list[Canonical]:
    return [{"prompt": _asked(record, "instruction", "context"), "completion": text_at(record, "response")}]


@register("gsm8k", "demonstrations", has_texts("question", "answer"))
def gsm8k(record: Fields) -> list[Canonical]:
    """Answers keep their calculator marks (<<6*7=42>>) and the last line "#### 42"."""
    return [{"prompt": instruction_prompt(text_at(record, "question")), "completion": text_at(record, "answer")}]


# Rankings


@register("summarize-from-feedback", "comparisons", has("info", "summaries", "choice"))
def summarize_from_feedback(record: Fields) -> list[Canonical]:
    """The chosen summary has rank 1, the others rank 2."""
    summaries = list_at(record, "summaries")
    chosen = choice_at(record, "choice", among=tuple(range(len(summaries))))
    return [
        {
            "prompt": text_at(record, "info", _post_field(record)) + "\n\nTL;DR:",
            "completions": [_led_by_space(text_at(record, "summaries", n, "text")) for n in range(len(summaries))],
            "ranks": [1 if position == chosen else 2 for position in range(len(summaries))],
            "labeler": record.get("worker"),
        }
    ]


def _post_field(record: Fields) -> str:
    """Reddit records have a post, the news records an article."""
    info = value_at(record, "info")
    return "article" if isinstance(info, dict) and not info.get("post") and info.get("article") else "post"


def _led_by_space(text: str) -> str:
    return text if text[:1].isspace() else " " + text


@register("webgpt", "comparisons", has("question", "answer_0", "answer_1", "score_0", "score_1"))
def webgpt(record: Fields) -> list[Canonical]:
    scores = [number_at(record, "score_0"), number_at(record, "score_1")]
    return [
        {
            "prompt": instruction_prompt(text_at(record, "question", "full_text")),
            "completions": [text_at(record, "answer_0"), text_at(record, "answer_1")],
            "ranks": ranks_of(scores),
        }
    ]


def ranks_of(scores: list) -> list[int]:
    """Ranks from scores where more is better: 1 + how many scores are higher, so equal scores tie."""
    return [1 + sum(other > score for other in scores) for score in scores]


@register("alpaca-eval", "comparisons", has("instruction", "responses"))
def alpaca_eval(record: Fields) -> list[Canonical]:
    """K models' outputs by how each was judged against text-davinci-003, and among equals against GPT-4."""
    judged = ("pref_vs_text_davinci_003", "pref_vs_gpt4_1106_preview")
    positions = range(len(list_at(record, "responses")))
    return [
        {
            "prompt": instruction_prompt(text_at(record, "instruction")),
            "completions": [text_at(record, "responses", position, "output") for position in positions],
            "ranks": ranks_of([tuple(number_at(record, "responses", n, name) for name in judged) for n in positions]),
            "source": record.get("dataset"),
        }
    ]


@register("qa-feedback", "comparisons", has("question", "preference", "prediction 1"))
def qa_feedback(record: Fields) -> list[Canonical]:
    """Four answers with a vote on each of the six pairs, in the order 12 13 14 23 24 34: 1 or 2 is better, 0 a tie.

    Ranked by votes won, a tie counting half. Votes that go in a circle keep that ranking and are counted.
    """
    pairs = list(combinations(range(4), 2))
    if len(list_at(record, "preference")) != len(pairs):
        raise Problem("field 'preference' must have six votes, one for each pair of four answers; mend it")
    votes = [choice_at(record, "preference", position, among=(0, 1, 2)) for position in range(len(pairs))]
    won = [0.0] * 4
    beats = set()
    for (left, right), vote in zip(pairs, votes):
        won[left] += {1: 1.0, 0: 0.5, 2: 0.0}[vote]
        won[right] += {2: 1.0, 0: 0.5, 1: 0.0}[vote]
        if vote:
            beats.add((left, right) if vote == 1 else (right, left))
    comparison = {
        "prompt": instruction_prompt(text_at(record, "question"), _passages(record)),
        "completions": [text_at(record, f"prediction {number}") for number in range(1, 5)],
        "ranks": ranks_of(won),
    }
    return [{**comparison, "note": "votes go in a circle"} if is_circular(beats) else comparison]


def _passages(record: Fields) -> str:
    """The passages that the answers draw on: each a title (which its first sentence repeats) and its sentences."""
    if record.get("passages") is None:
        return ""
    passages = []
    for position in range(len(list_at(record, "passages"))):
        length = len(list_at(record, "passages", position))
        sentences = [text_at(record, "passages", position, n, blank=True) for n in range(length)]
        repeated = length > 1 and sentences[1].startswith(sentences[0])
        passages.append(" ".join(sentences[1:] if repeated else sentences))
    return "\n\n".join(passages)


def is_circular(beats: set[tuple[int, int]]) -> bool:
    """Whether "a beats b" leads from some item back to itself: no order agrees with all of the votes."""
    left = {item for both in beats for item in both}
    while left:
        unbeaten = {item for item in left if not any((other, item) in beats for other in left)}
        if not unbeaten:
            return True
        left -= unbeaten
    return False


@register("pandalm", "comparisons", has("instruction", "response1", "response2", "annotator1"))
def pandalm(record: Fields) -> list[Canonical]:
    """One comparison for each annotator, named as the labeler: 1 or 2 is better, 0 a tie."""
    shared = {
        "prompt": _asked(record, "instruction", "input"),
        "completions": [text_at(record, "response1"), text_at(record, "response2")],
    }
    labelers = ["annotator1", *(name for name in ("annotator2", "annotator3") if record.get(name) is not None)]
    ranks = {0: [1, 1], 1: [1, 2], 2: [2, 1]}
    return [{**shared, "ranks": ranks[choice_at(record, who, among=(0, 1, 2))], "labeler": who} for who in labelers]


@register("tulu1-pairs", "comparisons", has("prompt", "completion_a", "completion_b", "preference"))
def tulu1_pairs(record: Fields) -> list[Canonical]:
    """Five grades, of which a ranking keeps three; how much better an answer is, is the difference of the ratings."""
    ratings = {
        "a-is-better": [2.0, 0.0],
        "a-is-slightly-better": [1.0, 0.0],
        "tie": [0.0, 0.0],
        "b-is-slightly-better": [0.0, 1.0],
        "b-is-better": [0.0, 2.0],
    }
    grades = ratings[choice_at(record, "preference", among=tuple(ratings))]
    return [
        {
            "prompt": text_at(record, "prompt"),
            "completions": [text_at(record, "completion_a"), text_at(record, "completion_b")],
            "ranks": ranks_of(grades),
            "ratings": grades,
        }
    ]


def _is_oasst_tree(record: Fields) -> bool:
    prompt = record.get("prompt")
    return isinstance(prompt, dict) and "replies" in prompt


@register("oasst", "comparisons", _is_oasst_tree)
def oasst(record: Fields) -> list[Canonical]:
    """A comparison for each prompter's message with two or more ranked replies; the path to it is the prompt.

    Replies that are deleted or have no rank are left out of their comparison. OASST counts ranks from 0.
    """
    comparisons = []
    unread: list[tuple[tuple[str | int, ...], list[dict[str, str]]]] = [(("prompt",), [])]
    while unread:
        path, before = unread.pop()
        node = value_at(record, *path)
        if not isinstance(node, dict):
            raise Problem(f"field {dotted(path)!r} must be a message with role, text and replies; mend it")
        role = choice_at(record, *path, "role", among=("prompter", "assistant"))
        message = {"role": {"prompter": "user"}.get(role, role), "content": text_at(record, *path, "text")}
        thread = [*before, message]
        replies = list_at(record, *path, "replies") if node.get("replies") else []
        ranked = [n for n, reply in enumerate(replies) if _is_ranked(reply)]
        if role == "prompter" and len(ranked) > 1:
            comparisons.append(_ranked_replies(record, (*path, "replies"), ranked, thread))
        # Last in, first out: reversed, so that comparisons come in the order in which the file has their messages.
        unread += [((*path, "replies", n), thread) for n in reversed(range(len(replies)))]
    if not comparisons:
        raise Nothing("no message has two ranked replies")
    return comparisons


def _is_ranked(reply: Any) -> bool:
    return isinstance(reply, dict) and reply.get("rank") is not None and not reply.get("deleted")


def _ranked_replies(record: Fields, path: tuple, ranked: list[int], prompt: list[dict[str, str]]) -> Canonical:
    ranks = [number_at(record, *path, n, "rank") for n in ranked]
    return {
        "prompt": prompt,
        "completions": [text_at(record, *path, n, "text") for n in ranked],
        "ranks": ranks_of([-rank for rank in ranks]),
    }


def trees(items: Iterator[Item]) -> Iterator[Item]:
    """OASST's other form, one message a row: the rows of a tree, which stand together, as the tree."""
    for tree, rows in groupby(items, key=_tree_of):
        if tree is None:
            yield from ((place, raw if isinstance(raw, Problem) else NO_TREE) for place, raw in rows)
            continue
        found = list(rows)
        yield found[0][0], _tree([row for _, row in found])


NO_TREE = Problem("field 'message_tree_id' must be a text; fill it in")


def _tree_of(item: Item) -> str | None:
    tree = item[1].get("message_tree_id") if isinstance(item[1], dict) else None
    return tree if isinstance(tree, str) else None


def _tree(rows: list[dict[str, Any]]) -> dict[str, Any] | Problem:
    nodes = {str(row.get("message_id")): {**row, "replies": []} for row in rows}
    roots: list[dict[str, Any]] = []
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent is not None and str(parent) not in nodes:
            return Problem(
                f"field 'parent_id' is {shown(parent)}, a message that its tree has not; put its rows together"
            )
        (roots if parent is None else nodes[str(parent)]["replies"]).append(node)
    if len(roots) != 1 or len(nodes) < len(rows):
        return Problem("field 'message_id' or 'parent_id' makes no tree of the rows from here; mend the ids")
    return {"prompt": roots[0]}


@register("oasst-messages", "comparisons", has("message_id", "message_tree_id", "role", "text"), gather=trees)
def oasst_messages(record: Fields) -> list[Canonical]:
    return oasst(record)


# Questions and prompts without an answer to learn from


@register("truthfulqa", "prompts", has("Question", "Best Answer", "Incorrect Answers"))
def truthfulqa(record: Fields) -> list[Canonical]:
    """The answers stay beside the prompt, split at their semicolons."""
    return [
        {
            "prompt": instruction_prompt(text_at(record, "Question")),
            "category": record.get("Category"),
            "best_answer": text_at(record, "Best Answer"),
            "correct_answers": _parts(text_at(record, "Correct Answers")),
            "incorrect_answers": _parts(text_at(record, "Incorrect Answers")),
        }
    ]


def _parts(answers: str) -> list[str]:
    return [part.strip() for part in answers.split(";") if part.strip()]


@register("bbq", "prompts", has("context", "question", "ans0", "ans1", "ans2", "label"))
def bbq(record: Fields) -> list[Canonical]:
    """The question with its three answers as options; all fields stay beside it."""
    options = "".join(f"\n({letter}) {text_at(record, f'ans{n}')}" for n, letter in enumerate("abc"))
    return [{**record, "prompt": instruction_prompt(text_at(record, "question") + options, text_at(record, "context"))}]


def _is_sst2(record: Fields) -> bool:
    if set(record) == {"column_1", "column_2"}:
        return record["column_2"] in ("0", "1")
    return has("sentence", "label")(record)


@register("sst2", "prompts", _is_sst2)
def sst2(record: Fields) -> list[Canonical]:
    """A sentence to continue, with its sentiment beside it; the file may have no header."""
    sentence, label = ("column_1", "column_2") if "column_1" in record else ("sentence", "label")
    value = choice_at(record, label, among=("0", "1", 0, 1, -1, "-1"))
    return [{"prompt": text_at(record, sentence), "label": int(value)}]


# Text


@register("crows-pairs", "text", has("sent_more", "sent_less"))
def crows_pairs(record: Fields) -> list[Canonical]:
    """Two texts: the sentence that stereotypes more, then the one that does so less."""
    return [{"text": text_at(record, name)} for name in ("sent_more", "sent_less")]


@register("songci", "text", has("rhythmic", "paragraphs"))
def songci(record: Fields) -> list[Canonical]:
    """A poem: its tune's name, then its lines."""
    lines = [text_at(record, "paragraphs", position) for position in range(len(list_at(record, "paragraphs")))]
    return [{"text": "\n".join([text_at(record, "rhythmic"), *lines])}]
