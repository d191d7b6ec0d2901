"""Loading: files and their faults, record checks, conversions between kinds, splits and fingerprints."""

import csv
import gzip
import io
import json
import logging

import datasets
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from rlhf import RLHFError
from rlhf.data import KINDS, DataError, fingerprint, load, split_by_key
from rlhf.data.formats import FORMATS

DEMO = {"prompt": "Say hi.", "completion": " Hi."}
RANKING = {"prompt": "Say hi.", "completions": [" Hi.", " No.", " Hm."], "ranks": [1, 3, 2]}
MESSAGES = [{"role": "user", "content": "Say hi."}]


def lines(path, *records, start=b""):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(start + text.encode())
    return str(path)


def failure(kind, name, **options):
    """The one line of the DataError that loading gives."""
    with pytest.raises(DataError) as caught:
        load(kind, str(name), **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Files


def test_every_file_type_gives_the_same_records(tmp_path):
    records = [{**DEMO, "user": "u1"}, {"prompt": 'Größe, \u2028 "it\'s"?\n', "completion": "1,\t2\n3", "user": "u2"}]
    lines(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"a.{suffix}", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion", "user"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    for path in list(tmp_path.iterdir()):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 10
    for path in paths:
        assert load("demonstrations", path).to_list() == records, path
    assert len({fingerprint(load("demonstrations", path))["sha256"] for path in paths}) == 1


def test_text_file_is_one_record_without_bom_and_carriage_returns(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfOne\r\n\r\nTwo\n")
    (tmp_path / "a.txt").write_bytes("Größe".encode())
    assert load("text", tmp_path).to_list() == [{"text": "Größe"}, {"text": "One\n\nTwo\n"}]


def test_bom_blank_lines_and_missing_last_newline(tmp_path):
    lines(tmp_path / "a.jsonl", DEMO, start=b"\xef\xbb\xbf\n  \n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(DEMO).encode())
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\n\r\nSay hi., Hi.\r\n")
    (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf\n[" + json.dumps(DEMO).encode() + b"]")
    (tmp_path / "e.json").write_text(json.dumps(DEMO, indent=2))  # one object over several lines
    for path in sorted(tmp_path.iterdir()):
        assert load("demonstrations", path).to_list() == [DEMO], path


def test_folder_reads_files_in_order_and_each_in_its_own_format(tmp_path):
    lines(tmp_path / "b.jsonl", {"question": "2+2?", "answer": "4"})
    lines(tmp_path / "a.jsonl", DEMO)
    lines(tmp_path / ".hidden.jsonl", {"prompt": "no", "completion": "no"})
    (tmp_path / "README.md").write_text("no data")
    assert load("demonstrations", tmp_path)["completion"] == [" Hi.", "4"]
    assert load("demonstrations", tmp_path.parent, data_dir=tmp_path.name)["completion"] == [" Hi.", "4"]
    assert "does not exist" in failure("demonstrations", tmp_path, data_dir="absent")


def test_folder_with_files_named_for_splits_never_mixes_them(tmp_path):
    lines(tmp_path / "train-0.jsonl", {"text": "one"})
    lines(tmp_path / "train.1.jsonl", {"text": "two"})
    lines(tmp_path / "test.jsonl", {"text": "three"})
    assert load("text", tmp_path)["text"] == ["one", "two"]
    assert load("text", tmp_path, split="test")["text"] == ["three"]
    assert "named for: test, train" in failure("text", tmp_path, split="dev")


def test_saved_data_sets(tmp_path):
    data = load("demonstrations", lines(tmp_path / "a.jsonl", DEMO, {**DEMO, "user": "u"}))
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "many")
    assert load("demonstrations", tmp_path / "one").to_list() == data.to_list()
    assert len(load("demonstrations", tmp_path / "many", split="test")) == 1
    assert "it has: train, test" in failure("demonstrations", tmp_path / "many", split="dev")
    (tmp_path / "one" / "state.json").unlink()
    assert "saved data set" in failure("demonstrations", tmp_path / "one")


FAULTY_FILES = {
    "empty.jsonl": (b"", "has no records"),
    "blank.json": (b" \n\n", "has no records"),
    "array.json": (b"[]", "has no records"),
    "header.csv": (b"prompt,completion\n", "has no records"),
    "torn.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", ', "torn.jsonl:2: malformed JSON"),
    "torn.json": (b'[{"prompt": "a", "completion": "b"},\n {"prompt"', "torn.json:2: malformed JSON"),
    "list.jsonl": (b'{"prompt": "a", "completion": "b"}\n[1]\n', "list.jsonl:2: a record must be an object"),
    "list.json": (b'[{"prompt": "a", "completion": "b"}, 1]', "list.json, record 2: a record must be an object"),
    "latin.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}\n', "latin.jsonl:2: byte 13 is not UTF-8"),
    "latin.json": (b'[\n\n"\xe9"]', "latin.json:3: byte 5 is not UTF-8"),
    "latin.txt": (b"a\nb\xe9", "latin.txt:2: byte 4 is not UTF-8"),
    "latin.csv": (b"prompt\na\n\xe9\n", "latin.csv:3: byte 1 is not UTF-8"),
    "wide.csv": (b"prompt,user\na,b\na,b,c\n", "wide.csv:3: the row has 3 cells, and the header 2"),
    "quote.csv": (b'prompt,user\n"a,b\n', "quote.csv:2: malformed table"),
    "twice.csv": (b"prompt,prompt\na,b\n", "names the column 'prompt' twice"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "gzip file is cut or damaged"),
    "not.json.gz": (b'{"prompt": "a"}', "gzip file is cut or damaged"),
    "not.parquet": (b"PAR1 and no more", "not a readable parquet file"),
    "deep.jsonl": (b"[" * 200_000, "JSON nested too deeply"),
    "digits.jsonl": (b'{"prompt": ' + b"9" * 5000 + b"}", "malformed JSON"),
    "blank.txt": (b" \n", "has no records (left out: blank text)"),
    "other.pdf": (b"%PDF", "unknown file type"),
}


@pytest.mark.parametrize("file", FAULTY_FILES)
def test_faulty_files_name_the_place(tmp_path, file):
    content, expected = FAULTY_FILES[file]
    (tmp_path / file).write_bytes(content)
    kind = "text" if file.endswith(".txt") else "demonstrations" if b"completion" in content else "prompts"
    assert expected in failure(kind, tmp_path / file)


def test_a_cut_archive_is_no_record_to_skip(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 9999)[:-20])
    assert "gzip" in failure("prompts", tmp_path / "cut.jsonl.gz", on_error="skip")


def test_names_that_are_not_there(tmp_path, monkeypatch):
    calls = []

    def no_network(name, config_name, **options):
        calls.append((name, config_name, options))
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    for name in ("absent.jsonl", "./absent", "org/absent.json.gz", "/absent/folder", "", "a/b/c", "nul\0", "x" * 5000):
        assert "does not exist" in failure("prompts", name) or not name.strip("x")
    assert len(calls) <= 1  # only the long plain name may be one of the Hub
    message = failure("prompts", "org/name", config_name="c", data_dir="d", split="train[:9]", revision="r")
    assert "no such local file or folder, and the Hub gave ConnectionError: Couldn't reach the Hub at all" in message
    assert calls[-1] == ("org/name", "c", {"data_dir": "d", "split": "train[:9]", "revision": "r"})


def test_hub_data_set_is_read_like_a_file(monkeypatch):
    rows = datasets.Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": None, "chosen": "b", "rejected": "c"}]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert "org/name, record 2: field 'prompt' is null" in failure("comparisons", "org/name")
    data = load("comparisons", "org/name", on_error="skip")
    assert data.to_list() == [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}]
    assert fingerprint(data)["name"] == "org/name"


def test_records_at_hand_and_standard_input_are_read_like_a_file(tmp_path, monkeypatch):
    wanted = load("comparisons", lines(tmp_path / "a.jsonl", RANKING, RANKING)).to_list()
    assert load("comparisons", [RANKING, RANKING]).to_list() == wanted
    assert load("comparisons", (dict(RANKING) for _ in range(2))).to_list() == wanted
    assert load("comparisons", datasets.Dataset.from_list([RANKING, RANKING])).to_list() == wanted
    assert load("comparisons", datasets.Dataset.from_list([RANKING, RANKING]).to_iterable_dataset()).to_list() == wanted
    assert "records, record 2: a record must be an object" in failure_of([RANKING, 3])
    for content in (
        b"".join(json.dumps(RANKING).encode() + b"\n" for _ in range(2)),
        json.dumps([RANKING] * 2).encode(),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert load("comparisons", "-").to_list() == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{"prompt": ""}\n')))
    assert "standard input:2: field 'prompt' is empty" in failure("prompts", "-")


def failure_of(records):
    with pytest.raises(DataError) as caught:
        load("comparisons", records)
    return str(caught.value)


def test_options_are_checked(tmp_path):
    name = lines(tmp_path / "a.jsonl", DEMO)
    assert "kind is 'demos'" in failure("demos", name)
    assert "on_error is 'ignore'" in failure("demonstrations", name, on_error="ignore")
    assert "format is 'csv'" in failure("demonstrations", name, format="csv")
    assert "slices are for Hub" in failure("demonstrations", name, split="train[:1]")
    assert "for Hub data sets" in failure("demonstrations", name, config_name="main")
    assert issubclass(DataError, RLHFError)


# Records


FAULTY_RECORDS = [
    ({**RANKING, "ranks": [1, 2]}, "field 'ranks' has 2 entries for 3 completions"),
    ({**RANKING, "ranks": [1, 2, 3, 4]}, "field 'ranks' has 4 entries for 3 completions"),
    ({**RANKING, "completions": [" Hi."], "ranks": [1]}, "field 'completions' has 1 entries, and a ranking has 2 to 9"),
    ({**RANKING, "completions": list("0123456789"), "ranks": [1] * 10}, "has 10 entries, and a ranking has 2 to 9"),
    ({**RANKING, "ranks": [0, 1, 2]}, "field 'ranks[0]' is 0, and ranks are whole numbers from 1 (best) up"),
    ({**RANKING, "ranks": [1, 2.0, 2]}, "field 'ranks[1]' is 2.0"),
    ({**RANKING, "ranks": [1, 2, True]}, "field 'ranks[2]' is True"),
    ({**RANKING, "ranks": [1, 2, None]}, "field 'ranks[2]' is None"),
    ({**RANKING, "ranks": [1, 2, 2**31]}, "field 'ranks[2]' is 2147483648"),
    ({**RANKING, "ranks": "1,2,3"}, "field 'ranks' must be a list, and is text"),
    ({**RANKING, "completions": [" Hi.", "", " Hm."]}, "field 'completions[1]' is empty"),
    ({**RANKING, "completions": [" Hi.", None, " Hm."]}, "field 'completions[1]' is missing"),
    ({**RANKING, "completions": [" Hi.", 3, " Hm."]}, "field 'completions[1]' must be text, and is the int 3"),
    ({**RANKING, "ended": [True, False]}, "field 'ended' has 2 entries for 3 completions"),
    ({**RANKING, "ended": [True, False, 1]}, "field 'ended[2]' is 1, and ended are true or false"),
    ({**RANKING, "prompt": ""}, "field 'prompt' is empty"),
    ({**RANKING, "prompt": " \n"}, "field 'prompt' is empty"),
    ({**RANKING, "prompt": None}, "field 'prompt' is null"),
    ({**RANKING, "prompt": {"text": "a"}}, "field 'prompt' must be text, and is an object"),
    ({**RANKING, "prompt": []}, "field 'prompt' has no messages"),
    ({**RANKING, "prompt": ["a"]}, "field 'prompt[0]' must be a message"),
    ({**RANKING, "prompt": [{"role": "user"}]}, "field 'prompt[0].content' is missing"),
    ({**RANKING, "prompt": [{"role": "human", "content": "a"}]}, "field 'prompt[0].role' must be one of system, user"),
    ({**RANKING, "prompt": [{"role": "user", "content": None}]}, "field 'prompt[0].content' is null"),
    ({**RANKING, "prompt": [{"role": "system", "content": "a"}]}, "ends with a system message"),
    ({**RANKING, "user": ["a"]}, "field 'user' must be text, and is a list"),
    ({**RANKING, "labeler": True}, "field 'labeler' must be text, and is true or false"),
]


@pytest.mark.parametrize(("record", "expected"), FAULTY_RECORDS, ids=[expected[:40] for _, expected in FAULTY_RECORDS])
def test_faulty_records_name_line_and_field(tmp_path, record, expected):
    good = {**RANKING, "prompt": MESSAGES} if isinstance(record["prompt"], list) else RANKING
    name = lines(tmp_path / "a.jsonl", good, record)
    message = failure("comparisons", name)
    assert expected in message and message.startswith(f"{name}:2: ")
    assert load("comparisons", name, on_error="skip").to_list() == [good]


@pytest.mark.parametrize("completion", ["", " \n", None, 7, ["a"]])
def test_faulty_completions(tmp_path, completion):
    name = lines(tmp_path / "a.jsonl", DEMO, {**DEMO, "completion": completion})
    assert "a.jsonl:2: field 'completion" in failure("demonstrations", name)
    assert len(load("demonstrations", name, on_error="skip")) == 1


def test_half_a_surrogate_pair_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a \\ud83d b"}\n{"prompt": "\\ud83d\\ude00"}\n')
    assert "a.jsonl:1: field 'prompt' holds half of a surrogate pair at character 2" in failure(
        "prompts", tmp_path / "a.jsonl"
    )
    assert load("prompts", tmp_path / "a.jsonl", on_error="skip")["prompt"] == ["\U0001f600"]


def test_rankings_keep_order_gaps_ties_and_optional_columns(tmp_path):
    full = {**RANKING, "ended": [True, True, False], "labeler": "l", "user": 7, "source": "s", "extra": [1]}
    tied = {**RANKING, "ranks": [9, 9, 9], "labeler": None, "user": ""}
    data = load("comparisons", lines(tmp_path / "a.jsonl", tied, full))
    assert data.column_names == ["prompt", "completions", "ranks", "ended", "labeler", "user", "source"]
    assert data[0] == {**tied, "ended": None, "user": None, "source": None}
    assert data[1] == {**RANKING, "ended": [True, True, False], "labeler": "l", "user": "7", "source": "s"}


def test_prompt_type_is_the_same_throughout(tmp_path):
    name = lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": MESSAGES})
    assert "a.jsonl:2: field 'prompt' changes between text and messages" in failure("prompts", name)


def test_further_fields_of_prompts_are_kept(tmp_path):
    name = lines(tmp_path / "a.jsonl", {"z": 1, "prompt": "a", "user": 3}, {"prompt": "a", "y": {"k": ["v"]}, "z": 2.5})
    data = load("prompts", name)
    assert data.column_names == ["prompt", "user", "z", "y"]
    assert data[1] == {"prompt": "a", "user": None, "z": 2.5, "y": {"k": ["v"]}}
    assert "field 'z' has values" in failure(
        "prompts", lines(tmp_path / "b.jsonl", *({"prompt": "a", "z": z} for z in (1, "b")))
    )


def test_further_fields_agree_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.data.reading.CHUNK", 2)
    values = [None, None, 1, 2, 2.5, None]
    data = load("prompts", lines(tmp_path / "a.jsonl", *({"prompt": "a", "z": value} for value in values)))
    assert data["z"] == values
    message = failure("prompts", lines(tmp_path / "b.jsonl", *({"prompt": "a", "z": z} for z in (1, 2, "b"))))
    assert "changes its type" in message


def test_skipping_counts_why(tmp_path, caplog):
    name = lines(
        tmp_path / "a.jsonl", DEMO, {**DEMO, "completion": ""}, {**DEMO, "prompt": 3}, {**DEMO, "completion": " "}
    )
    with caplog.at_level(logging.INFO):
        assert len(load("demonstrations", name, on_error="skip")) == 1
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert "skipped 3 records (2: field 'completion' is empty" in skipped[0]
    places = [
        f"skipped {name}:{line}: field '{field}'"
        for line, field in ((2, "completion"), (3, "prompt"), (4, "completion"))
    ]
    assert [line.startswith(place) for line, place in zip(skipped[1:], places, strict=True)] == [True] * 3
    pairs = [{**RANKING, "completions": texts} for texts in (["a", "b", "c"], ["", "b", "c"], ["a", "", "c"])]
    load("comparisons", lines(tmp_path / "c.jsonl", *pairs), on_error="skip")
    assert "2: field 'completions[N]' is empty" in caplog.text  # one fault at two places is one reason
    name = lines(tmp_path / "b.jsonl", {**DEMO, "completion": ""}, {**DEMO, "completion": ""})
    assert "every record was skipped; the first:" in failure("demonstrations", name, on_error="skip")


def test_of_many_skipped_records_the_first_are_listed(tmp_path, caplog):
    load("demonstrations", lines(tmp_path / "a.jsonl", *[{**DEMO, "completion": ""}] * 25, DEMO), on_error="skip")
    assert caplog.text.count("skipped ") == 1 + 10 and "… and 15 more" in caplog.text


def test_ids_that_repeat_are_counted_and_kept(tmp_path, caplog):
    records = [{"id": 1, **DEMO}, {"id": "1", **DEMO}, {"id": 1, **DEMO}, {"id": None, **DEMO}, {"id": None, **DEMO}]
    assert len(load("demonstrations", lines(tmp_path / "a.jsonl", *records))) == 5
    assert "1 with an id that came before" in caplog.text


def test_a_line_of_ten_megabytes_is_a_record_like_another(tmp_path):
    long = {**DEMO, "prompt": "word " * 2_000_000}
    data = load("demonstrations", lines(tmp_path / "a.jsonl", DEMO, long))
    assert [len(prompt) for prompt in data["prompt"]] == [7, 10_000_000]
    (tmp_path / "b.jsonl").write_text('{"prompt": "' + "x" * 10_000_000)
    assert len(failure("prompts", tmp_path / "b.jsonl")) < 500


def test_ties_are_counted(tmp_path, caplog):
    load("comparisons", lines(tmp_path / "a.jsonl", RANKING, {**RANKING, "ranks": [2, 2, 2]}))
    assert "1 all tied" in caplog.text


def test_blank_lines_of_a_corpus_are_counted(tmp_path, caplog):
    data = load("text", lines(tmp_path / "a.jsonl", {"text": ""}, {"text": "a"}, {"text": " \n"}))
    assert data["text"] == ["a"] and "2 left out: blank text" in caplog.text


def test_duplicates_stay(tmp_path):
    assert len(load("prompts", lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "a"}))) == 2


# Conversions


def test_comparisons_as_other_kinds(tmp_path):
    second = {**RANKING, "completions": ["x", "y", "z"], "ranks": [2, 1, 1], "user": "u", "labeler": "l"}
    name = lines(tmp_path / "a.jsonl", RANKING, second, {**second, "prompt": "Other."})
    assert load("demonstrations", name).to_list() == [
        {**DEMO, "user": None},
        {"prompt": "Say hi.", "completion": "y", "user": "u"},
        {"prompt": "Other.", "completion": "y", "user": "u"},
    ]
    assert load("prompts", name)["prompt"] == ["Say hi.", "Other."]
    assert load("text", name)["text"] == ["Say hi. Hi.", "Say hi.y", "Other.y"]


def test_a_cut_completion_is_no_demonstration(tmp_path, caplog):
    cut = {**RANKING, "ended": [False, True, True]}
    name = lines(tmp_path / "a.jsonl", cut, {**cut, "ended": [False] * 3})
    assert load("demonstrations", name)["completion"] == [" Hm."]
    assert "1 left out: every completion was cut" in caplog.text


def test_demonstrations_as_other_kinds(tmp_path):
    name = lines(tmp_path / "a.jsonl", DEMO, {**DEMO, "completion": " Hello."}, {"prompt": "b", "completion": "c"})
    assert load("prompts", name).to_list() == [
        {"prompt": "Say hi.", "reference": " Hi."},
        {"prompt": "b", "reference": "c"},
    ]
    assert load("text", name)["text"] == ["Say hi. Hi.", "Say hi. Hello.", "bc"]
    chat = lines(
        tmp_path / "chat.jsonl", {"prompt": [{"role": "system", "content": "S"}, *MESSAGES], "completion": "Hi."}
    )
    assert load("text", chat)["text"] == ["S\n\nSay hi.\n\nHi."]


@pytest.mark.parametrize(
    ("record", "holds", "kind"),
    [
        ({"prompt": "a"}, "prompts", "text"),
        ({"prompt": "a"}, "prompts", "demonstrations"),
        (DEMO, "demonstrations", "comparisons"),
        ({"text": "a"}, "text", "prompts"),
    ],
)
def test_conversions_that_make_no_sense(tmp_path, record, holds, kind):
    message = failure(kind, lines(tmp_path / "a.jsonl", record))
    assert f"holds {holds}" in message and f"cannot be read as {kind}" in message


# Splits and fingerprints


def side_of(data, key, **options):
    """{key: "train" or "eval"} of a split."""
    train, held_out = split_by_key(data, **options)
    assert len(train) + len(held_out) == len(data)
    return {key(r): "train" for r in train} | {key(r): "eval" for r in held_out}


def test_split_keeps_sides_when_data_and_fraction_grow():
    rows = [{"prompt": f"p{n}"} for n in range(600)]
    small, large = datasets.Dataset.from_list(rows[::3]), datasets.Dataset.from_list(rows[::-1])
    key = lambda record: record["prompt"]  # noqa: E731
    before, after = side_of(small, key, eval_fraction=0.2), side_of(large, key, eval_fraction=0.2)
    assert {name: after[name] for name in before} == before
    held_out = sum(side == "eval" for side in after.values())
    assert 80 < held_out < 160  # 600 * 0.2 = 120, standard deviation 9.8
    wider = side_of(large, key, eval_fraction=0.4)
    assert all(wider[name] == "eval" for name, side in after.items() if side == "eval")
    assert side_of(large, key, eval_fraction=0.2, seed=1) != after


def test_split_is_by_sha256_of_seed_and_key():
    # printf '0\0prompt\0a' | sha256sum starts with 9e5aac4d573f9aca
    value = 0x9E5AAC4D573F9ACA / 2**64
    data = datasets.Dataset.from_list([{"prompt": "a"}])
    assert len(split_by_key(data, value + 1e-9)[1]) == 1
    assert len(split_by_key(data, value - 1e-9)[1]) == 0


def test_split_sends_one_prompt_to_one_side_in_every_kind(tmp_path):
    questions = [f"Question {n}?" for n in range(100)]
    demos = datasets.Dataset.from_list([{"prompt": q, "completion": "a"} for q in questions])
    ranked = datasets.Dataset.from_list([{"prompt": q, "completions": ["a", "b"], "ranks": [1, 2]} for q in questions])
    chats = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": q}], "user": None} for q in questions])
    text_of = lambda r: r["prompt"] if isinstance(r["prompt"], str) else r["prompt"][0]["content"]  # noqa: E731
    sides = [side_of(data, text_of, eval_fraction=0.3) for data in (demos, ranked, chats)]
    assert sides[0] == sides[1] == sides[2] and set(sides[0].values()) == {"train", "eval"}


def test_split_keeps_a_user_together():
    data = datasets.Dataset.from_list([{"prompt": f"p{n}", "user": f"u{n % 40}"} for n in range(400)])
    train, held_out = split_by_key(data, 0.3)
    assert not set(train["user"]) & set(held_out["user"]) and len(set(held_out["user"])) > 4


def test_split_of_text_and_bad_fractions():
    data = datasets.Dataset.from_list([{"text": f"t{n}"} for n in range(50)])
    assert [len(part) for part in split_by_key(data, 0)] == [50, 0]
    assert 0 < len(split_by_key(data, 0.5)[1]) < 50
    for fraction in (1, -0.1, float("nan"), True):
        with pytest.raises(DataError):
            split_by_key(data, fraction)


def test_fingerprint_follows_records_and_order(tmp_path):
    records = [DEMO, {**DEMO, "prompt": "b", "user": "u"}]
    data = load("demonstrations", lines(tmp_path / "a.jsonl", *records))
    mark = fingerprint(data)
    assert {**mark, "sha256": ""} == {"name": "a.jsonl", "kind": "demonstrations", "records": 2, "sha256": ""}
    # printf '%s\n' '{"completion":" Hi.","prompt":"Say hi."}' '{"completion":" Hi.","prompt":"b","user":"u"}' | sha256sum
    assert mark["sha256"] == "6ebc59d0fc04bd164c2c8967377a73d8a7edbdebf355aa44de4671e57781dbaf"
    assert fingerprint(data.select([1, 0]))["sha256"] != mark["sha256"]
    assert fingerprint(data.select([0]))["sha256"] != mark["sha256"]
    again = load("demonstrations", lines(tmp_path / "b.jsonl", *records))
    assert fingerprint(again)["sha256"] == mark["sha256"]
    kinds = [load(kind, lines(tmp_path / "c.jsonl", RANKING)) for kind in KINDS]
    assert [fingerprint(data)["kind"] for data in kinds] == list(KINDS)


def test_loading_twice_gives_the_same_data_set(tmp_path):
    name = lines(tmp_path / "a.jsonl", RANKING, RANKING)
    first, second = load("comparisons", name), load("comparisons", name)
    assert first.features == second.features and first._fingerprint == second._fingerprint
    assert first.cache_files == []  # nothing is written


# Fuzz: whatever stands in a file, loading gives records or a DataError of one line


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# fmt: off
NAMES = [
    "prompt", "completion", "completions", "ranks", "ended", "labeler", "user", "source", "text", "chosen", "rejected",
    "messages", "conversations", "role", "content", "from", "value", "instruction", "input", "output", "response", "context",
    "instances", "question", "answer", "info", "post", "summaries", "choice", "worker", "full_text", "answer_0", "answer_1",
    "score_0", "score_1", "replies", "rank", "responses", "preference", "passages", "response1", "response2", "annotator1",
    "annotator2", "completion_a", "completion_b", "sentence", "label", "sent_more", "sent_less", "rhythmic", "paragraphs",
    "message_id", "parent_id", "message_tree_id", "id",
]
# fmt: on
FIELD = st.sampled_from(NAMES)
TEXTS = st.sampled_from(
    ["a", "user", "assistant", "human", "gpt", "prompter", "\n\nHuman: a\n\nAssistant: b", "", "\ud800"]
)
NEAR = st.recursive(
    TEXTS | st.integers(-1, 3) | st.none() | st.floats() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=4),
    max_leaves=20,
)
SUFFIX = st.sampled_from(["json", "jsonl", "csv", "tsv", "parquet", "txt"])
FORMAT_OR_NONE = st.none() | st.sampled_from(sorted(FORMATS))
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loads_or_explains(path, kind, **options) -> bool:
    """Whether the records load, and can be hashed and split, or the error is one line."""
    try:
        data = load(kind, path, **options)
    except DataError as error:
        return len(str(error).splitlines()) == 1
    fingerprint(data)
    return len(data) > 0 and sum(map(len, split_by_key(data, 0.5))) == len(data)


@FUZZ
@given(content=st.binary(max_size=200), suffix=SUFFIX, data=st.data())
def test_any_bytes_load_or_give_a_data_error(tmp_path, content, suffix, data):
    path = tmp_path / f"a.{suffix}"
    if data.draw(st.booleans()):
        path = tmp_path / f"a.{suffix}.gz"
        content = data.draw(st.sampled_from([content, gzip.compress(content), gzip.compress(content)[:-5]]))
    path.write_bytes(content)
    assert loads_or_explains(
        path, data.draw(st.sampled_from(KINDS)), on_error=data.draw(st.sampled_from(["stop", "skip"]))
    )


@FUZZ
@given(
    values=st.lists(JSON | st.dictionaries(FIELD, NEAR, max_size=6), max_size=4), as_lines=st.booleans(), data=st.data()
)
def test_any_json_loads_or_gives_a_data_error(tmp_path, values, as_lines, data):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, values)) if as_lines else json.dumps(values))
    on_error = data.draw(st.sampled_from(["stop", "skip"]))
    assert loads_or_explains(
        path, data.draw(st.sampled_from(KINDS)), on_error=on_error, format=data.draw(FORMAT_OR_NONE)
    )


@FUZZ
@given(format=st.sampled_from(sorted(FORMATS)), record=st.dictionaries(FIELD, NEAR, max_size=8))
def test_any_fields_go_through_every_format(tmp_path, format, record):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    assert loads_or_explains(path, FORMATS[format].kind, format=format)
