"""Formats: each on records written here, and on whole published files where a checkout has them beside it."""

import csv
import gzip
import json
import logging
from pathlib import Path

import datasets
import pytest

from rlhf.data import DataError, load
from rlhf.data.formats import FORMATS
from rlhf.data.named import instruction_prompt, is_circular, ranks_of

USER = {"role": "user", "content": "Colour of grass?"}
GREEN, BLUE = {"role": "assistant", "content": "Green."}, {"role": "assistant", "content": "Blue."}
ASKED = "### Instruction:\nColour of grass?\n\n### Response:\n"
ASKED_WITH_INPUT = "### Instruction:\nColour of grass?\n\n### Input:\nIn May.\n\n### Response:\n"
HH = "\n\nHuman: Colour of grass?\n\nAssistant:"


def ranked(prompt, *completions, ranks, **more):
    return {"prompt": prompt, "completions": list(completions), "ranks": ranks, **more}


def said(who, value):
    return {"from": who, "value": value}


TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter",
        "text": "Q1",
        "replies": [
            {
                "role": "assistant",
                "text": "A1",
                "rank": 1,
                "replies": [
                    {
                        "role": "prompter",
                        "text": "Q3",
                        "replies": [{"role": "assistant", "text": f"C{n}", "rank": n} for n in (0, 1)],
                    }
                ],
            },
            {
                "role": "assistant",
                "text": "A0",
                "rank": 0,
                "replies": [
                    {
                        "role": "prompter",
                        "text": "Q2",
                        "rank": None,
                        "replies": [
                            {"role": "assistant", "text": "B2", "rank": 2},
                            {"role": "assistant", "text": "B?", "rank": None},
                            {"role": "assistant", "text": "Bx", "rank": 1, "deleted": True},
                            {"role": "assistant", "text": "B0", "rank": 0},
                        ],
                    }
                ],
            },
        ],
    },
}
Q1, Q2, Q3 = ({"role": "user", "content": text} for text in ("Q1", "Q2", "Q3"))
A0, A1 = ({"role": "assistant", "content": text} for text in ("A0", "A1"))

BBQ = {"context": "In May.", "question": "Who?", "ans0": "A", "ans1": "B", "ans2": "C", "label": 2, "category": "Age"}
TRUTHFUL = {
    "Type": "Adversarial",
    "Category": "Plants",
    "Question": "Colour of grass?",
    "Best Answer": "Green",
    "Correct Answers": "Green; It is green;",
    "Incorrect Answers": "Blue; Red",
}
VOTES = {"question": "Colour of grass?", **{f"prediction {n}": f"p{n}" for n in (1, 2, 3, 4)}}
JUDGED = [("g", 1.0, 1.9), ("b", 2.0, 1.1), ("r", 1.0, 1.9), ("y", 2.0, 1.2)]


def rows_of(node, parent=None, number=0):
    """The tree as OASST's other form has it: one message a row, parents first."""
    name = f"{parent or ''}/{number}"
    row = {"message_id": name, "parent_id": parent, "message_tree_id": "t", "rank": None, "deleted": False, **node}
    replies = row.pop("replies", [])
    return [row, *(found for n, reply in enumerate(replies) for found in rows_of(reply, name, n))]


# format, one raw record (or the rows that make one), the canonical records it gives
CASES = [
    ("prompt-completion", {"prompt": "a", "completion": " b"}, [{"prompt": "a", "completion": " b"}]),
    ("prompt-completion", {"prompt": [USER], "completion": [GREEN]}, [{"prompt": [USER], "completion": "Green."}]),
    ("ranking", ranked([USER], "x", "y", ranks=[2, 1]), [ranked([USER], "x", "y", ranks=[2, 1])]),
    (
        "ranking",
        {**ranked("a", ranks=[1, 1]), "completions": [[GREEN], BLUE]},
        [ranked("a", "Green.", "Blue.", ranks=[1, 1])],
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, [ranked("a", "b", "c", ranks=[1, 2])]),
    (
        "preference",
        {"prompt": [USER], "chosen": [GREEN], "rejected": [BLUE]},
        [ranked([USER], "Green.", "Blue.", ranks=[1, 2])],
    ),
    (
        "preference",
        {"prompt": "Colour of grass?", "chosen": [USER, GREEN], "rejected": [USER, BLUE]},
        [ranked([USER], "Green.", "Blue.", ranks=[1, 2])],
    ),
    (
        "implicit-preference",
        {"chosen": [USER, GREEN], "rejected": [USER, BLUE]},
        [ranked([USER], "Green.", "Blue.", ranks=[1, 2])],
    ),
    (
        "implicit-preference",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        [ranked("The sky is", " blue.", " black.", ranks=[1, 2])],
    ),
    (
        "implicit-preference",
        {"chosen": "Q?\n\nA", "rejected": "Q?\n\nB"},
        [ranked("Q?", "\n\nA", "\n\nB", ranks=[1, 2])],
    ),
    (
        "implicit-preference",
        {"chosen": "天空是蓝", "rejected": "天空是黑"},
        [ranked("天空是", "蓝", "黑", ranks=[1, 2])],
    ),
    ("hh", {"chosen": HH + " Green.", "rejected": HH + " Grey."}, [ranked(HH, " Green.", " Grey.", ranks=[1, 2])]),
    (
        "hh",  # the last shared turn, of two
        {"chosen": HH + " Hm." + HH + " Green.", "rejected": HH + " Hm." + HH + " Grey."},
        [ranked(HH + " Hm." + HH, " Green.", " Grey.", ranks=[1, 2])],
    ),
    (
        "hh",  # one continues past the other's end
        {"chosen": HH + " Green.", "rejected": HH + " Green." + HH + " Blue."},
        [ranked(HH, " Green.", " Green." + HH + " Blue.", ranks=[1, 2])],
    ),
    (
        "hh",  # they part inside a human turn
        {"chosen": HH + " Hm.\n\nHuman: So?\n\nAssistant: G", "rejected": HH + " Hm.\n\nHuman: Say!\n\nAssistant: B"},
        [ranked(HH, " Hm.\n\nHuman: So?\n\nAssistant: G", " Hm.\n\nHuman: Say!\n\nAssistant: B", ranks=[1, 2])],
    ),
    (
        "messages",
        {"messages": [USER, GREEN, USER, BLUE, USER]},
        [{"prompt": [USER, GREEN, USER], "completion": "Blue."}],
    ),
    (
        "sharegpt",
        {"conversations": [said("system", "S"), said("human", "Colour of grass?"), said("gpt", "Green.")]},
        [{"prompt": [{"role": "system", "content": "S"}, USER], "completion": "Green."}],
    ),
    (
        "sharegpt-preference",
        {"conversations": [said("human", "Colour of grass?")], "chosen": said("gpt", "Green."), "rejected": "Blue."},
        [ranked([USER], "Green.", "Blue.", ranks=[1, 2])],
    ),
    (
        "alpaca",
        {"instruction": "Colour of grass?", "input": "", "output": "Green.", "text": "all of it"},
        [{"prompt": ASKED, "completion": "Green."}],
    ),
    (
        "alpaca",
        {"instruction": "Colour of grass?", "input": "In May.", "output": "Green."},
        [{"prompt": ASKED_WITH_INPUT, "completion": "Green."}],
    ),
    (
        "dolly",
        {"instruction": "Colour of grass?", "context": "In May.", "response": "Green.", "category": "open_qa"},
        [{"prompt": ASKED_WITH_INPUT, "completion": "Green."}],
    ),
    (
        "self-instruct",
        {
            "instruction": "Colour of grass?",
            "instances": [{"input": "", "output": "Green."}, {"input": "In May.", "output": "Lush."}],
        },
        [{"prompt": ASKED, "completion": "Green."}, {"prompt": ASKED_WITH_INPUT, "completion": "Lush."}],
    ),
    (
        "gsm8k",
        {"question": "Colour of grass?", "answer": "<<2*3=6>>6\n#### 6"},
        [{"prompt": ASKED, "completion": "<<2*3=6>>6\n#### 6"}],
    ),
    (
        "summarize-from-feedback",
        {
            "info": {"post": "Long story.", "title": "T"},
            "summaries": [{"text": " One."}, {"text": "Two."}],
            "choice": 1,
            "worker": "w1",
        },
        [ranked("Long story.\n\nTL;DR:", " One.", " Two.", ranks=[2, 1], labeler="w1")],
    ),
    (
        "summarize-from-feedback",
        {"info": {"post": None, "article": "News."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        [ranked("News.\n\nTL;DR:", " a", " b", ranks=[1, 2])],
    ),
    (
        "webgpt",
        {
            "question": {"full_text": "Colour of grass?", "id": 1},
            "answer_0": "Blue.",
            "answer_1": "Green.",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        [ranked(ASKED, "Blue.", "Green.", ranks=[2, 1])],
    ),
    (
        "oasst",  # in the order of the file
        TREE,
        [
            ranked([Q1], "A1", "A0", ranks=[2, 1]),
            ranked([Q1, A1, Q3], "C0", "C1", ranks=[1, 2]),
            ranked([Q1, A0, Q2], "B2", "B0", ranks=[2, 1]),
        ],
    ),
    (
        "oasst-messages",
        rows_of(TREE["prompt"]),
        [
            ranked([Q1], "A1", "A0", ranks=[2, 1]),
            ranked([Q1, A1, Q3], "C0", "C1", ranks=[1, 2]),
            ranked([Q1, A0, Q2], "B2", "B0", ranks=[2, 1]),
        ],
    ),
    (
        "alpaca-eval",  # by the first judge: b y over g r; by the second: y over b, g r tie
        {
            "instruction": "Colour of grass?",
            "dataset": "d",
            "responses": [
                {"model": m, "output": m, "pref_vs_text_davinci_003": x, "pref_vs_gpt4_1106_preview": y}
                for m, x, y in JUDGED
            ],
        },
        [ranked(ASKED, "g", "b", "r", "y", ranks=[3, 2, 3, 1], source="d")],
    ),
    (
        "qa-feedback",  # pairs 12 13 14 23 24 34: 1 beats all (3 votes), 2 and 3 tie and beat 4 (1.5), 4 has none
        {**VOTES, "preference": [1, 1, 1, 0, 1, 1]},
        [ranked(ASKED, "p1", "p2", "p3", "p4", ranks=[1, 2, 2, 4])],
    ),
    (
        "qa-feedback",  # 1 over 2, 2 over 3, 3 over 1, all over 4: two votes each
        {**VOTES, "preference": [1, 2, 1, 1, 1, 1], "passages": [["T", "T is x.", "It is y."], ["U", "Z."]]},
        [
            ranked(
                "### Instruction:\nColour of grass?\n\n### Input:\nT is x. It is y.\n\nU Z.\n\n### Response:\n",
                *("p1", "p2", "p3", "p4"),
                ranks=[1, 1, 1, 4],
            )
        ],
    ),
    (
        "pandalm",
        {
            "instruction": "Colour of grass?",
            "input": "In May.",
            "response1": "Green.",
            "response2": "Blue.",
            "annotator1": 1,
            "annotator2": 2,
            "annotator3": 0,
        },
        [
            ranked(ASKED_WITH_INPUT, "Green.", "Blue.", ranks=ranks, labeler=f"annotator{n}")
            for n, ranks in ((1, [1, 2]), (2, [2, 1]), (3, [1, 1]))
        ],
    ),
    *(
        (
            "tulu1-pairs",
            {"prompt": "a", "completion_a": "b", "completion_b": "c", "preference": grade},
            [{**ranked("a", "b", "c", ranks=ranks), "ratings": ratings}],
        )
        for grade, ranks, ratings in (
            ("a-is-better", [1, 2], [2.0, 0.0]),
            ("a-is-slightly-better", [1, 2], [1.0, 0.0]),
            ("tie", [1, 1], [0.0, 0.0]),
            ("b-is-slightly-better", [2, 1], [0.0, 1.0]),
            ("b-is-better", [2, 1], [0.0, 2.0]),
        )
    ),
    (
        "truthfulqa",
        TRUTHFUL,
        [
            {
                "prompt": ASKED,
                "category": "Plants",
                "best_answer": "Green",
                "correct_answers": ["Green", "It is green"],
                "incorrect_answers": ["Blue", "Red"],
            }
        ],
    ),
    (
        "bbq",
        BBQ,
        [{"prompt": "### Instruction:\nWho?\n(a) A\n(b) B\n(c) C\n\n### Input:\nIn May.\n\n### Response:\n", **BBQ}],
    ),
    ("sst2", {"sentence": "fine film", "label": 1, "idx": 0}, [{"prompt": "fine film", "label": 1}]),
    ("sst2", {"column_1": "dull film", "column_2": "0"}, [{"prompt": "dull film", "label": 0}]),
    ("crows-pairs", {"sent_more": "m", "sent_less": "l"}, [{"text": "m"}, {"text": "l"}]),
    ("songci", {"rhythmic": "调", "author": "某", "paragraphs": ["一。", "二。"]}, [{"text": "调\n一。\n二。"}]),
    ("text", {"text": "a", "meta": {}}, [{"text": "a"}]),
    ("prompt", {"prompt": "a", "answer": "b"}, [{"prompt": "a", "answer": "b"}]),
    ("prompt", {"prompt": [USER]}, [{"prompt": [USER]}]),
]


def loaded(tmp_path, kind, record, **options):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return load(kind, str(path), **options).to_list()


@pytest.mark.parametrize(
    ("format", "record", "expected"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)]
)
def test_formats(tmp_path, caplog, format, record, expected):
    with caplog.at_level(logging.INFO):
        found = loaded(tmp_path, FORMATS[format].kind, record)
    assert found == expected
    assert f"(1 as {format})" in caplog.text  # detected, and not by a format that happens to give the same
    assert loaded(tmp_path, FORMATS[format].kind, record, format=format) == expected


def sources_of(tmp_path, rows):
    """(name, source) of the records in a file of every type that can hold them, in a folder, at hand, and as a stream."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for suffix, content in (("json", json.dumps(rows)), ("jsonl", lines)):
        for name, data in ((f"b.{suffix}", content.encode()), (f"b.{suffix}.gz", gzip.compress(content.encode()))):
            (tmp_path / name).write_bytes(data)
            yield name, tmp_path / name
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines, encoding="utf-8")
    yield "folder", tmp_path / "folder"
    yield "records", rows
    if all(isinstance(value, str) for row in rows for value in row.values()):
        for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
            with open(tmp_path / f"b.{suffix}", "w", newline="", encoding="utf-8") as stream:
                csv.writer(stream, delimiter=delimiter).writerows([rows[0].keys(), *(row.values() for row in rows)])
            yield suffix, tmp_path / f"b.{suffix}"
    # Parquet has no empty struct, and no format here reads one.
    table = datasets.Dataset.from_list([{k: v for k, v in row.items() if v != {}} for row in rows])
    table.to_parquet(tmp_path / "b.parquet")
    yield "parquet", tmp_path / "b.parquet"
    yield "stream", table.to_iterable_dataset()


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_the_same_in_every_kind_of_file(tmp_path, format):
    """By its fields and by its name. Tables fill fields that a struct has elsewhere with nulls."""
    record = next(record for name, record, _ in CASES if name == format)
    kind = FORMATS[format].kind
    wanted = loaded(tmp_path, kind, record)
    seen = set()
    for name, source in sources_of(tmp_path, record if isinstance(record, list) else [record]):
        seen.add(name)
        assert load(kind, source).to_list() == wanted, name
        assert load(kind, source, format=format).to_list() == wanted, name
    assert seen >= {"b.json", "b.json.gz", "b.jsonl", "b.jsonl.gz", "folder", "records", "parquet", "stream"}


def test_every_format_has_a_case():
    assert {case[0] for case in CASES} == set(FORMATS)


REFUSED = [
    (
        {"chosen": HH + " Green.", "rejected": "\n\nHuman: Hm?\n\nAssistant: Blue."},
        "comparisons",
        "share no '\\n\\nAssistant:'",
    ),
    ({"chosen": HH + " ", "rejected": HH + " Blue."}, "comparisons", "field 'chosen' is empty"),
    ({"chosen": "Green.", "rejected": "Blue."}, "comparisons", "share no beginning"),
    ({"chosen": [GREEN], "rejected": [BLUE]}, "comparisons", "share no first message"),
    ({"chosen": [USER, GREEN], "rejected": [USER]}, "comparisons", "share no first message"),
    (
        {"chosen": [USER, GREEN, USER, BLUE], "rejected": [USER, BLUE]},
        "comparisons",
        "'chosen' must end in one assistant",
    ),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BLUE]}, "comparisons", "'chosen' must end in one assistant"),
    ({"prompt": "a", "completion": "b", "label": True}, "demonstrations", "field 'label' marks answers as good or bad"),
    ({"messages": [USER]}, "demonstrations", "field 'messages' has no answer"),
    ({"messages": [GREEN]}, "demonstrations", "field 'messages' has no answer"),
    (
        {"conversations": [said("alien", "x")]},
        "demonstrations",
        "field 'conversations[0].from' must be one of system, human",
    ),
    ({"conversations": [said("human", "")]}, "demonstrations", "field 'conversations[0].value' is empty"),
    ({"conversations": []}, "demonstrations", "field 'conversations' has no turns"),
    ({"instruction": "a", "output": ""}, "demonstrations", "field 'output' is empty"),
    ({"instruction": "a", "output": None}, "demonstrations", "field 'output' is null"),
    ({"instruction": "a", "input": 3, "output": "b"}, "demonstrations", "field 'input' must be text, and is the int 3"),
    ({"instruction": "a", "instances": []}, "demonstrations", "field 'instances' has no entries"),
    ({"instruction": "a", "instances": [{"input": ""}]}, "demonstrations", "field 'instances[0].output' is missing"),
    (
        {"info": {"post": "a"}, "summaries": [{"text": "b"}] * 2, "choice": 2},
        "comparisons",
        "field 'choice' must be one of 0, 1",
    ),
    ({"info": {}, "summaries": [{"text": "b"}] * 2, "choice": 0}, "comparisons", "field 'info.post' is missing"),
    ({**VOTES, "preference": [0] * 5}, "comparisons", "field 'preference' must have six votes"),
    (
        {**VOTES, "preference": [0, 1, 2, 3, 0, 0]},
        "comparisons",
        "field 'preference[3]' must be one of 0, 1, 2, and is 3",
    ),
    ({"prompt": {"role": "prompter", "text": "", "replies": []}}, "comparisons", "field 'prompt.text' is empty"),
    (
        {"prompt": {"role": "judge", "text": "a", "replies": []}},
        "comparisons",
        "field 'prompt.role' must be one of prompter",
    ),
    ({"prompt": {"role": "prompter", "text": "a", "replies": []}}, "comparisons", "no message has two ranked replies"),
    (
        {"some": 1, "thing": 2},
        "comparisons",
        "fits no known format (its fields: 'some', 'thing'); name one of: ranking",
    ),
    ({}, "prompts", "fits no known format (its fields: none)"),
]


@pytest.mark.parametrize(("record", "kind", "expected"), REFUSED, ids=[expected[:50] for _, _, expected in REFUSED])
def test_refusals_name_the_field(tmp_path, record, kind, expected):
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, kind, record)
    assert expected in str(caught.value) and "a.jsonl" in str(caught.value)


def test_oasst_rows_that_make_no_tree_are_named(tmp_path, caplog):
    rows = rows_of(TREE["prompt"])
    other = [{**row, "message_tree_id": "u"} for row in rows]
    path = tmp_path / "rows.jsonl"

    def write(*records):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    write(*rows, *other)
    assert len(load("comparisons", path)) == 6
    write(*rows, *other[1:])
    with pytest.raises(DataError, match=rf"rows.jsonl:{len(rows) + 1}: field 'parent_id' is '/0', a message that"):
        load("comparisons", path)
    assert len(load("comparisons", path, on_error="skip")) == 3
    for broken in ([*rows, rows[0]], [*rows, {**rows[0], "message_id": "second root"}]):
        write(*broken)
        with pytest.raises(DataError, match=r"rows.jsonl:1: .* makes no tree"):
            load("comparisons", path)
    write(*rows, {**rows[0], "message_tree_id": None})
    with pytest.raises(DataError, match=rf"rows.jsonl:{len(rows) + 1}: field 'message_tree_id'"):
        load("comparisons", path)


def test_an_oasst_node_with_ten_ranked_replies_is_refused(tmp_path):
    replies = [{"role": "assistant", "text": f"a{n}", "rank": n} for n in range(10)]
    with pytest.raises(DataError, match="has 10 entries, and a ranking has 2 to 9"):
        loaded(tmp_path, "comparisons", {"prompt": {"role": "prompter", "text": "q", "replies": replies}})


@pytest.mark.parametrize(
    "record", [{"chosen": HH + " a", "rejected": HH + " a"}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
)
def test_a_choice_between_equal_texts_is_left_out_and_counted(tmp_path, caplog, record):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (record, {**record, "chosen": record["chosen"] + "b"})))
    assert len(load("comparisons", path)) == 1
    assert "1 left out: chosen and rejected are the same text" in caplog.text


def test_votes_in_a_circle_are_counted(tmp_path, caplog):
    loaded(tmp_path, "comparisons", {**VOTES, "preference": [1, 2, 1, 1, 1, 1]})
    assert "1 votes go in a circle" in caplog.text
    assert is_circular({(0, 1), (1, 2), (2, 3), (3, 0)})
    assert not is_circular({(0, 1), (0, 2), (1, 3), (2, 3)}) and not is_circular(set())


def test_ranks_of_scores():
    assert ranks_of([0.1, 3, 3, -1]) == [3, 1, 1, 4]


def test_a_text_column_decides_where_text_is_asked_for(tmp_path):
    record = {"instruction": "a", "input": "", "output": "b", "text": "a, rendered: b"}
    assert loaded(tmp_path, "text", record) == [{"text": "a, rendered: b"}]
    del record["text"]
    assert loaded(tmp_path, "text", record) == [{"text": instruction_prompt("a") + "b"}]


def test_detection_looks_past_a_first_record_at_fault(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a"}\n{"instruction": "a", "output": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'output' is missing"):
        load("demonstrations", path)


def test_a_named_format_reads_what_detection_would_not(tmp_path):
    transcript = {"prompt": "ignored", "chosen": HH + " a", "rejected": HH + " b"}
    assert loaded(tmp_path, "comparisons", transcript, format="hh")[0]["prompt"] == HH
    with pytest.raises(DataError, match="field 'question' is missing"):
        loaded(tmp_path, "demonstrations", transcript, format="gsm8k")


# Published files. Counts are records of the file less those whose text is blank or no text, which `skip` leaves out.

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = [
    ("demonstrations", "sft/gsm8k_train.jsonl", "gsm8k", 7473, 0),
    ("demonstrations", "sft/alpaca_data.json.gz", "alpaca", 52_002 - 28, 28),
    ("demonstrations", "sft/alpaca_zh_4k.jsonl", "alpaca", 4000 - 4, 4),
    ("demonstrations", "sft/self_instruct_seed_tasks.jsonl", "self-instruct", 175, 0),
    ("demonstrations", "sft/belle_zh_seed_tasks.json", "self-instruct", 175, 0),
    ("comparisons", "pref/hh_harmless_base.jsonl", "hh", 1721 - 4, 4),
    ("comparisons", "pref/alpaca_eval_kway_dev.jsonl", "alpaca-eval", 537, 0),
    ("comparisons", "pref/qa_feedback_k4.jsonl", "qa-feedback", 378, 0),
    ("comparisons", "pref/pandalm_testset_v1.json", "pandalm", 3 * (999 - 61), 61),
    ("comparisons", "pref/tulu1_human_pairs.jsonl", "tulu1-pairs", 1150, 0),
    ("comparisons", "pref/dpo_en_demo.json", "sharegpt-preference", 300, 0),
    ("comparisons", "pref/dpo_zh_demo.json", "sharegpt-preference", 300, 0),
    ("prompts", "prompts/user_oriented_instructions.jsonl", "self-instruct", 252, 0),
    ("prompts", "prompts/koala_test_set.jsonl", "prompt", 180, 0),
    ("prompts", "eval/TruthfulQA.csv", "truthfulqa", 817, 0),
    ("prompts", "eval/bbq_Age.jsonl", "bbq", 3680, 0),
    ("prompts", "eval/bbq_Religion.jsonl", "bbq", 1200, 0),
    ("prompts", "eval/sst2_train.tsv", "sst2", 6920, 0),
    ("prompts", "eval/sst2_dev.tsv", "sst2", 872, 0),
    ("text", "eval/crows_pairs_anonymized.csv", "crows-pairs", 2 * 1508, 0),
    ("text", "corpus/novels", "text", 23, 0),
    ("text", "corpus/tinyshakespeare.txt", "text", 1, 0),
    ("text", "corpus/wikitext2_valid.txt", "text", 1, 0),
    ("text", "corpus/songci_4k.jsonl", "songci", 4000, 0),
]
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="the folder shared/data does not lie beside this checkout"
)


@needs_real_data
@pytest.mark.parametrize(("kind", "file", "format", "count", "skipped"), FILES, ids=[row[1] for row in FILES])
def test_published_files(caplog, kind, file, format, count, skipped):
    with caplog.at_level(logging.INFO):
        data = load(kind, REAL / file, on_error="skip")
    assert len(data) == count
    assert f" as {format})" in caplog.text
    assert (f"skipped {skipped} records" in caplog.text) == bool(skipped)
    if skipped:
        with pytest.raises(DataError):
            load(kind, REAL / file)


@needs_real_data
def test_every_published_file_is_tested():
    data_files = {path.relative_to(REAL).as_posix() for path in REAL.rglob("*.*") if path.is_file()}
    tested = {row[1] for row in FILES} | {"README.md"}
    untested = {name for name in data_files if name not in tested and Path(name).parent.as_posix() not in tested}
    assert {name for name in untested if not name.startswith("tokenizer/")} == set()


@needs_real_data
def test_published_rankings_have_the_pairs_that_others_counted():
    judged = load("comparisons", REAL / "pref/alpaca_eval_kway_dev.jsonl")
    longer_is_better = [
        (len(c[i]) > len(c[j])) + (len(c[i]) == len(c[j])) / 2
        for c, r in zip(judged["completions"], judged["ranks"])
        for i in range(len(r))
        for j in range(len(r))
        if r[i] < r[j]
    ]
    assert sum(longer_is_better) / len(longer_is_better) == pytest.approx(0.716, abs=1e-3)
    assert sorted({len(ranks) for ranks in judged["ranks"]}) == [7, 8, 9]
    votes = load("comparisons", REAL / "pref/qa_feedback_k4.jsonl")
    assert sum(len(set(ranks)) == 1 for ranks in votes["ranks"]) == 7
