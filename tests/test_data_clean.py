"""Cleaning: what each step removes and what it leaves, splits that stay, output that is whole or absent; and inspection."""

import hashlib
import json
import random
import re
import subprocess
import sys
from array import array
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
import pytest

from rlhf import cli, data_cli
from rlhf.data import DataError, clean, duplicates, fingerprint, load, split_by_key
from rlhf.data_page import histogram

ROOT = Path(__file__).resolve().parents[1]
OFF = {"max_length": 0, "personal_data": "keep", "prefix": 0, "minhash": 0, "per_user": 0, "leakage": False}
THANKED = (" Thanks.", " Thank you.", " Please.", " Thank you!", " Thanks!")


def options(**on):
    return clean.Options(**{**OFF, "validation": 0, "test": 0, **on})


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def write(tmp_path):
    def write(records, name="raw.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepared(write, tmp_path):
    """What is left for training of some prompts, and the report."""

    def prepared(records, chosen, **more):
        records = [{"prompt": record} if isinstance(record, str) else record for record in records]
        out = tmp_path / "out"
        report = clean.prepare(write(records), out, chosen, **more)
        return lines(out / "train.jsonl"), report

    return prepared


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "demo_world.generate", "--out", str(folder), "--scale", "0.2"]
    subprocess.run(command, check=True, cwd=ROOT / "data", capture_output=True, timeout=60)
    return folder


# ---- each step


def test_with_all_steps_off_every_record_is_kept(prepared):
    records = [{"prompt": "Same.", "user": "a@b.org"}] * 3
    assert prepared(records, options())[0] == records


def test_a_prompt_at_the_limit_stays_and_one_over_it_goes(prepared):
    kept, report = prepared(["one two three .", "one two three four ."], options(max_length=4))
    assert kept == [{"prompt": "one two three ."}]
    assert report.removed["length"] == {"over 4": 1}


def test_a_user_keeps_the_first_prompts_up_to_the_cap(prepared):
    records = [{"prompt": f"{user} {n}", "user": user} for n in range(4) for user in "ab"]
    records += [{"prompt": f"nobody {n}"} for n in range(5)]
    kept, report = prepared(records, options(per_user=3))
    assert kept == records[:6] + records[8:]
    assert report.removed["prompts a user"].total() == 2


LONG = "The quick brown fox jumps over the lazy dog and runs home. " * 5  # 295 characters
DISTINCT = ["I need two sentences about Pell.", "I need two sentences about Mira.", "Tell me about Wim."]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("Where is Pell?", "where  is\nPELL?", "same"),
        ("User: Where is Pell?\nAssistant:", "User: Where is Pell? Thanks.\nAssistant:", "prefix"),
        ("User: Where is Pell? Thanks.\nAssistant:", "User: Where is Pell?\nAssistant:", "prefix"),
        (LONG + "Then it eats.", LONG + "Then it sleeps.", "prefix"),
        (LONG + "Then it eats.", "Now read this: " + LONG + "Then it eats.", "minhash"),
        (DISTINCT[0], DISTINCT[1], None),
        ("Tell me about Wim.", "Tell me about Wim in three sentences.", None),
        ("Name a cat", "Name a category", None),
        ("Name a category", "Name a cat", None),
        ("Hi.", "Hi. " + LONG, None),  # less than half of it
        (LONG + "Then it eats.", LONG + " ".join(f"A{n}" for n in range(60)), None),
        ("请写一首关于春天的诗。", "请写一首关于春天的诗。谢谢！", "prefix"),
        ("请写一首关于春天的诗。", "请写一首关于秋天的诗。", None),
        (
            "写一个故事，" + "讲一只猫住在山上的小屋里。" * 2 + "它每天都下山去看海",
            "请" * 3 + "写一个故事，" + "讲一只猫住在山上的小屋里。" * 2 + "它每天都下山去看海",
            "minhash",
        ),
    ],
)
def test_near_duplicates(first, second, reason):
    index = clean.PromptIndex(prefix=0.5, minhash=0.8)
    index.add(first)
    assert index.match(second) == reason


def test_near_duplicates_by_minhash_are_those_above_the_threshold():
    # Of 100 words in a row two texts share all but the first k: 98 triples each, 98 - k shared, J = (98-k)/(98+k).
    words = [f"w{n}" for n in range(100)]
    index = clean.PromptIndex(prefix=0, minhash=0.9)
    index.add(" ".join(words))
    assert index.match(" ".join([*"abcde", *words[5:]])) == "minhash"  # 93/103 = 0.903
    assert index.match(" ".join([*"abcdef", *words[6:]])) is None  # 92/104 = 0.885


def test_bands_find_what_a_comparison_of_all_pairs_finds():
    """Over several doublings of the tables. Jaccard similarities here are 1, at least 0.94, or below 0.6."""
    rng = random.Random(0)
    words = [f"w{n}" for n in range(40)]
    texts, sizes, having = [], [], defaultdict(list)  # of kept texts: how many triples, and which have a triple
    index = clean.PromptIndex(prefix=0, minhash=0.9)
    for n in range(3000):
        text = rng.choices(words, k=100)
        if n % 3 == 2:
            text = ["so", *rng.choice(texts)]
        texts.append(text)
        triples = {tuple(text[k : k + 3]) for k in range(len(text) - 2)}
        shared = Counter(place for triple in triples for place in having[triple])
        similar = any(n >= 0.9 * (len(triples) + sizes[place] - n) for place, n in shared.items())
        assert (index.match(" ".join(text)) is not None) == similar, n
        if not similar:
            for triple in triples:
                having[triple].append(len(sizes))
            sizes.append(len(triples))
            index.add(" ".join(text))
    assert len(index.bands.hashes) == 2048 and len(sizes) == 2000


def test_every_prompt_of_a_full_slot_is_found(monkeypatch):
    """Forty hashes for 1,500 prompts, over two doublings: each chain has some 37 prompts, of any age."""
    monkeypatch.setattr(
        duplicates.Bands, "_hashes_of", lambda bands, key: np.full(bands.count, int(key.text[:2]), dtype=np.uint32)
    )
    index, rng = clean.PromptIndex(prefix=0, minhash=0.9), random.Random(0)
    texts = [f"{10 + n % 40} " + " ".join(rng.choices("abcdefghij", k=60)) for n in range(1500)]
    for text in texts:
        assert index.match(text) is None
        index.add(text)
    assert all(index.match(text + " more") == "minhash" for text in texts)


def test_length_counts_the_words_of_every_script():
    count = clean.length_counter(None)
    assert [count(text) for text in ("two words.", "春天来了。", "ไทย", "한국어 말")] == [3, 5, 3, 2]


def test_a_duplicate_is_found_among_many_with_the_same_beginning():
    index = clean.PromptIndex(prefix=0.5, minhash=0)
    for n in range(300):
        index.add(f"Write a story about number {n}.")
    assert index.match("Write a story about number 150. Thanks.") == "prefix"
    assert index.match("Write a story about number 301.") is None


def test_rankings_of_one_prompt_are_kept_and_a_repeated_record_is_not(prepared):
    record = {"prompt": "Where?", "completions": ["a", "b"], "ranks": [1, 2], "labeler": "ann"}
    kept, _ = prepared([record, {**record, "labeler": "ben"}, record], options(prefix=0.5))
    assert [found["labeler"] for found in kept] == ["ann", "ben"]


# ---- personal data


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mail ann.lee+x@mail.example.org now", "mail [EMAIL] now"),
        ("call +1 202 555 0129 or 202-555-0129", "call [PHONE] or [PHONE]"),
        ("call +49 30 901820.", "call [PHONE]."),
        ("Card 4111 1111 1111 1111 is mine", "Card [CARD] is mine"),
        ("IBAN GB82 WEST 1234 5698 7654 32, please", "IBAN [IBAN], please"),
        ("SSN 536-90-4399", "SSN [SSN]"),
        ("Regards, Ann Lee, ann@lee.org", "Regards, [NAME], [EMAIL]"),
        ("Mira thanks Juno. Best wishes\nAnn\nann@lee.org", "Mira thanks Juno. Best wishes\n[NAME]\n[EMAIL]"),
        ("Regards, Ann Lee", "Regards, Ann Lee"),
        ("Card 4111 1111 1111 1112, pi 3.1415926535, on 2024-01-02 12:00", None),
        ("a@b, @home, 12:30-14:00, 1000000 times", None),
        ("我的邮箱是ann@lee.org谢谢", "我的邮箱是[EMAIL]谢谢"),
        ("卡号4111111111111111，身份证11010519491231002X号", "卡号[CARD]，身份证[ID]号"),
        ("IBAN：GB82WEST12345698765432。致电+86 139 1234 5678吧", "IBAN：[IBAN]。致电[PHONE]吧"),
        ("身份证110105194912310021号", None),
    ],
)
def test_personal_data_is_masked(text, wanted):
    assert clean.masked(text, clean.personal_data(text)) == (wanted or text)


def test_long_text_without_spaces_takes_no_long_time():
    for text in ("a" * 300_000, "1" * 300_000, "\n" * 300_000 + "a", "thanks" + "\n" * 300_000):
        assert clean.personal_data("ann@lee.org " + text) == [(0, 11, "EMAIL")]
        duplicates.normalised(text)


def test_personal_data_is_dropped_or_masked_in_every_text(prepared, tmp_path):
    records = [
        {"prompt": "Who?", "completion": " Write to ann@lee.org.", "user": "ann"},
        {"prompt": "Where?", "completion": " There.", "user": "ben@lee.org"},
    ]
    kept, report = prepared(records, options(personal_data="drop"))
    assert [record["prompt"] for record in kept] == ["Where?"]
    assert report.removed["personal data"] == {"email": 1}
    report = clean.prepare(tmp_path / "raw.jsonl", tmp_path / "masked", options(personal_data="mask"))
    text = (tmp_path / "masked" / "train.jsonl").read_text()
    assert " Write to [EMAIL]." in text and "@" not in text
    assert report.masked == 1 and report.removed["personal data"].total() == 0


def test_messages_are_masked():
    step = clean.PersonalData("mask", "US")
    record = step({"prompt": [{"role": "user", "content": "I am ann@lee.org"}]})
    assert record == {"prompt": [{"role": "user", "content": "I am [EMAIL]"}]}


# ---- splits and leakage


def test_users_stay_where_they_are_when_data_grow(write, tmp_path):
    records = [{"prompt": f"Question {n}?", "user": f"user-{n % 60}"} for n in range(300)]
    sides = []
    for name, chosen in (("few", records[:120]), ("more", records[::-1])):
        clean.prepare(write(chosen), tmp_path / name, options(validation=0.2, test=0.2))
        splits = ("train", "validation", "test")
        found = {split: {r["user"] for r in lines(tmp_path / name / f"{split}.jsonl")} for split in splits}
        assert sum(map(len, found.values())) == 60 and all(found.values())
        sides.append(found)
    assert sides[0] == sides[1]


def test_shares_of_the_splits():
    chosen = options(validation=0.2, test=0.1)
    splits = Counter(clean.split_of({"prompt": "x", "user": str(n)}, chosen) for n in range(5000))
    assert abs(splits["validation"] / 5000 - 0.2) < 0.02 and abs(splits["test"] / 5000 - 0.1) < 0.02


def test_the_training_split_can_be_split_again_by_the_stage(prepared, tmp_path):
    """Drawn from one hash, the share that a stage cuts off would already have gone."""
    records = [{"prompt": f"Question {n}?", "user": str(n)} for n in range(400)]
    prepared(records, options(validation=0.1, test=0.1))
    train, held_out = split_by_key(load("prompts", tmp_path / "out"), 0.1)
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15


def test_training_prompts_that_evaluation_has_are_removed(write, tmp_path):
    records = [{"prompt": f"Question {n}?", "user": f"user-{n}"} for n in range(40)]
    chosen = options(validation=0.3)
    sides = {split: [r for r in records if clean.split_of(r, chosen) == split] for split in ("train", "validation")}
    copied = {**sides["validation"][0], "user": sides["train"][0]["user"]}  # comes first, in another user's name
    raw, elsewhere = write([copied, *records]), write([{"prompt": sides["train"][3]["prompt"]}], "eval.jsonl")

    kept_all = clean.prepare(raw, tmp_path / "leaking", chosen)
    assert kept_all.splits["train"]["records"] == len(sides["train"]) + 1
    chosen = options(validation=0.3, leakage=True)
    removed = []
    report = clean.prepare(
        raw, tmp_path / "out", chosen, evaluation=(elsewhere,), removal=lambda *told: removed.append(told)
    )
    assert report.removed["leakage"] == {"same": 2}
    told = {(place.rsplit(":", 1)[1], step, found["prompt"]) for place, step, _, found in removed}
    assert told == {
        ("1", "leakage", copied["prompt"]),
        (str(records.index(sides["train"][3]) + 2), "leakage", sides["train"][3]["prompt"]),
    }
    train = {record["prompt"] for record in lines(tmp_path / "out" / "train.jsonl")}
    assert train == {r["prompt"] for r in sides["train"]} - {sides["train"][3]["prompt"]}
    assert lines(tmp_path / "out" / "validation.jsonl") == sides["validation"]


# ---- output


def test_manifest_and_card_say_what_is_there(prepared, tmp_path):
    records = [{"prompt": f"Wo ist Nr. {n} – hier?", "user": f"u{n}", "area": n, "nothing": None} for n in range(50)]
    prepared([*records, *records[:5]], clean.Options())
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["README.md", "manifest.json", *(f"{split}.jsonl" for split in manifest["splits"])]
    )
    for split, found in manifest["splits"].items():
        path = out / found["file"]
        assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found["sha256"] == fingerprint(load("prompts", out, split=split))["sha256"]
        assert f"| {split} | {found['records']} | {found['users']} |" in (out / "README.md").read_text()
    assert (manifest["read"], manifest["removed"]["near-duplicates"]) == (55, 5)
    assert sum(found["records"] for found in manifest["splits"].values()) == 50
    assert manifest["source"]["sha256"] == hashlib.sha256((tmp_path / "raw.jsonl").read_bytes()).hexdigest()


def test_the_same_file_gives_the_same_bytes(world, tmp_path):
    made = []
    for name in ("a", "b"):
        clean.prepare(world / "prompts.jsonl", tmp_path / name, clean.Options())
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]


def test_nothing_is_left_behind_by_a_fault(write, tmp_path):
    raw = write([{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(DataError, match=r"raw.jsonl:2: field 'prompt' is empty"):
        clean.prepare(raw, tmp_path / "out", options())
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]
    report = clean.prepare(raw, tmp_path / "out", options(), on_error="skip")
    assert (report.read, report.skipped) == (1, 1)


def test_a_folder_with_files_is_not_overwritten(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(DataError, match="there already"):
        clean.prepare(write([{"prompt": "a"}]), tmp_path / "out", options())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no records"),
        ('{"a": 1}\n', "fits no known format"),
        ('{"prompt": \n', "malformed JSON"),
        ('{"text": "words"}\n', "holds text"),
    ],
)
def test_faulty_files_are_one_line(tmp_path, content, message):
    (tmp_path / "raw.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        clean.prepare(tmp_path / "raw.jsonl", tmp_path / "out", options())


def test_faulty_options_are_one_line():
    for wrong in ({"prefix": 2}, {"validation": 0.6, "test": 0.5}, {"per_user": -1}, {"phone_region": "USA"}):
        with pytest.raises(DataError, match="must be"):
            options(**wrong)


# ---- sources


def test_a_folder_is_cleaned_as_one(write, tmp_path):
    (tmp_path / "raw").mkdir()
    write([{"prompt": "Where?"}, {"prompt": "When?"}], "raw/a.jsonl")
    write([{"instruction": "Where?", "output": "There."}], "raw/b.jsonl.gz").rename(tmp_path / "raw" / "b.jsonl")
    clean.prepare(tmp_path / "raw", tmp_path / "out", options(prefix=0.5), kind="prompts")
    kept = [record["prompt"] for record in lines(tmp_path / "out" / "train.jsonl")]
    assert kept == ["Where?", "When?", "### Instruction:\nWhere?\n\n### Response:\n"]
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert source["name"] == "raw" and sorted(source["files"]) == ["a.jsonl", "b.jsonl"]


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        rows = [{"prompt": f"Question {n}?", "user": str(n)} for n in range(40)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["data", "prepare", "org/name", "--out", str(tmp_path / "out"), "--revision", "main", "--no-leakage"]
    assert cli.main(arguments) == 0
    assert asked == [(("org/name", None), {"data_dir": None, "split": "train", "revision": "main", "streaming": True})]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["read"] == 40
    assert manifest["source"] == {"name": "org/name", "split": "train", "revision": "main"}


def test_a_stream_that_breaks_off_leaves_nothing(tmp_path, monkeypatch, capsys):
    def rows():
        yield {"prompt": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    assert cli.main(["data", "prepare", "org/name", "--out", str(tmp_path / "out")]) == 2
    assert "reading broke off (ConnectionError: reset by peer)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_records_come_from_a_pipe(tmp_path):
    records = "".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(30))
    command = [sys.executable, "-m", "rlhf.cli", "data", "prepare", "-", "--out", str(tmp_path / "out")]
    subprocess.run(command, input=records.encode(), check=True, capture_output=True, timeout=60)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == {"name": "standard input"}
    assert sum(split["records"] for split in manifest["splits"].values()) == 30


def test_what_is_skipped_is_listed(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    raw = write([{"prompt": "a"}, *[{"prompt": ""}] * 12, {"prompt": 3}])
    removed = tmp_path / "removed.jsonl"
    arguments = ["--on-error", "skip", "--validation", "0", "--test", "0", "--removed", str(removed)]
    assert cli.main(["data", "prepare", str(raw), "--out", str(tmp_path / "out"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "1 records read, 13 skipped as faulty" in shown and "and 3 more" in shown
    assert shown.count("field 'prompt' is empty") == 10
    told = lines(removed)
    assert [found["place"] for found in told] == [f"{raw}:{n}" for n in range(2, 15)]
    assert told[-1]["step"] == "fault" and "must be text" in told[-1]["reason"]


def test_what_is_left_out_and_faults_of_evaluation_files_are_said(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pair = {"prompt": "a", "chosen": "x", "rejected": "y"}
    raw = write(
        [pair, {**pair, "prompt": "b", "rejected": "x"}, {"prompt": "c", "completions": ["x", "y"], "ranks": [1, 1]}]
    )
    asked, removed = tmp_path / "asked.jsonl", tmp_path / "removed.jsonl"
    asked.write_text('{"prompt": "d"}\n{"prompt": ""}\n{"prompt": 3}\n')
    words = ["--on-error", "skip", "--validation", "0", "--test", "0", "--removed", str(removed)]
    out = tmp_path / "out"
    assert cli.main(["data", "prepare", str(raw), "--out", str(out), "--evaluation", str(asked), *words]) == 0
    shown = capsys.readouterr().out
    manifest, card = json.loads((out / "manifest.json").read_text()), (out / "README.md").read_text()
    assert manifest["skipped"] >= 2 and f"{manifest['skipped']} skipped as faulty" in shown
    assert f"skipped as faulty: {manifest['skipped']}\n" in card
    assert {f"{asked}:2", f"{asked}:3"} <= {found["place"] for found in lines(removed)}
    assert manifest["notes"] and sum(manifest["notes"].values()) >= 1
    for note, count in manifest["notes"].items():
        assert note in shown and f"\n{note}: {count}\n" in card


# ---- the demo world


@pytest.mark.parametrize(
    ("name", "clean_records"), [("demonstrations", 260), ("comparison_prompts", 660), ("prompts", 620)]
)
def test_the_demo_world_loses_what_was_put_in_to_be_removed(world, tmp_path, name, clean_records):
    """The counts are a fifth of 1,300, 3,300 and 3,100: the clean records that the world was made of."""
    report = clean.prepare(
        world / f"{name}.jsonl", tmp_path / "out", clean.Options(), evaluation=(world / "eval_prompts.jsonl",)
    )
    kept = [record for split in report.splits for record in lines(tmp_path / "out" / f"{split}.jsonl")]
    assert len(kept) == clean_records
    assert report.removed["leakage"].total() == report.removed["length"].total() == 0
    prompts = [record["prompt"].removesuffix("\nAssistant:") for record in kept]
    assert not any("Regards" in prompt or "@" in prompt or "555" in prompt for prompt in prompts)
    assert not {prompt + thanks for prompt in prompts for thanks in THANKED} & set(prompts)


def test_heavy_users_of_the_demo_world_are_capped(world, tmp_path):
    before = Counter(record["user"] for record in lines(world / "prompts.jsonl"))
    report = clean.prepare(world / "prompts.jsonl", tmp_path / "out", options(per_user=5))
    after = Counter(record["user"] for record in lines(tmp_path / "out" / "train.jsonl"))
    assert max(before.values()) > 5
    assert after == {user: min(count, 5) for user, count in before.items()}
    assert report.removed["prompts a user"].total() == before.total() - after.total() > 0


def test_the_demo_world_s_files_are_cleaned_in_one_call(world, tmp_path):
    names = {"demonstrations": 260, "comparison_prompts": 660, "prompts": 620}
    paths = [world / f"{name}.jsonl" for name in names]
    reports = clean.clean_files(paths, tmp_path / "out", evaluation=[world / "eval_prompts.jsonl"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.jsonl" for name in names}
    for name, count in names.items():
        raw, kept = lines(world / f"{name}.jsonl"), lines(tmp_path / "out" / f"{name}.jsonl")
        assert len(kept) == count and reports[name].read == len(raw)
        steps = reports[name].steps
        assert steps[-1]["kept"] == count and steps[0]["kept"] == len(raw) - steps[0]["removed"]
        prompts = iter(record["prompt"] for record in raw)
        assert all(record["prompt"] in prompts for record in kept)  # in their order
        examples = [step["example"] for step in steps if step["removed"]]
        assert len(examples) == 2 and all(len(found["text"]) <= clean.EXAMPLE + 2 for found in examples)
        assert "@" not in str(examples) and "555" not in str(examples)
    removed = sum(report.read for report in reports.values()) - 1540
    assert clean.summary(reports).startswith(f"removed {removed} of {removed + 1540:,} records: ")


def test_cleaning_files_replaces_all_of_them_or_none(write, tmp_path):
    good, bad = write([{"prompt": "Where?"}], "a.jsonl"), write([{"prompt": "Who?"}, {"prompt": ""}], "b.jsonl")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"b.jsonl:2: field 'prompt' is empty"):
        clean.clean_files([good, bad], out)
    assert list(out.iterdir()) == []
    clean.clean_files([good], out)
    assert [path.name for path in out.iterdir()] == ["a.jsonl"]
    with pytest.raises(DataError, match="overwrite"):
        clean.clean_files([good], tmp_path)
    leaked = write([{"prompt": "Where?"}, {"prompt": "When?"}], "a.jsonl.2.jsonl")
    report = clean.clean_files([leaked], out, evaluation=[good])["a.jsonl.2"]
    assert report.steps[-1]["example"] == {"place": f"{leaked}:1", "reason": "same", "text": "Where?"}
    assert clean.summary({"": report}) == "removed 1 of 2 records: 1 that evaluation asks"


# ---- commands


def test_prepare_on_the_command_line(write, tmp_path, capsys):
    raw = write([{"prompt": f"Question {n}?", "user": f"u{n}"} for n in range(30)] + [{"prompt": "I am a@b.org"}])
    out, removed = tmp_path / "out", tmp_path / "removed.jsonl"
    arguments = ["data", "prepare", raw, "--out", out, "--removed", removed, "--per-user", 0, "--no-leakage"]
    assert cli.main([*map(str, arguments)]) == 0
    assert "31 records read" in capsys.readouterr().out
    chosen = json.loads((out / "manifest.json").read_text())["options"]
    assert (chosen["per_user"], chosen["leakage"], chosen["max_length"]) == (0, False, 1000)
    told = {"place": f"{raw}:31", "reason": "email", "record": {"prompt": "I am a@b.org"}, "step": "personal data"}
    assert lines(removed) == [told]
    assert cli.main([*map(str, arguments)]) == 2
    assert capsys.readouterr().err.startswith("error: ") and lines(removed) == [told]


def test_a_format_can_be_named(write, tmp_path, capsys):
    record = {"prompt": "p", "question": "Where?", "answer": " There.", "completion": " c"}
    raw = write([record] * 3)
    assert cli.main(["data", "inspect", str(raw), "--format", "gsm8k"]) == 0
    assert "read as gsm8k" in capsys.readouterr().out
    arguments = ["data", "prepare", str(raw), "--out", str(tmp_path / "out"), "--no-leakage", "--test", "0"]
    assert cli.main([*arguments, "--validation", "0", "--prefix", "0", "--minhash", "0", "--format", "gsm8k"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["formats"]) == ("demonstrations", {"gsm8k": 3})
    assert lines(tmp_path / "out" / "train.jsonl")[0]["completion"] == " There."
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(raw), "--format", "gsm9k"]) == 2
    assert "format is 'gsm9k', and must be one of ranking, hh" in capsys.readouterr().err


DEEP = json.loads("[" * 500 + "]" * 500)
UNWRITABLE = [
    ({"meta": DEEP}, "field 'meta' is nested more than 64 deep"),
    ({"meta": {"a": ["\ud800"]}}, "field 'meta' holds half of a surrogate pair"),
    ({"meta": {"\ud800": 1}}, "the name of field '\\ud800' holds half of a surrogate pair"),
    ({"\ud800k": 1}, "the name of field '\\ud800k' holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("further", "told"), UNWRITABLE, ids=[told[-30:] for _, told in UNWRITABLE])
def test_further_fields_that_cannot_be_written_are_faults(write, tmp_path, capsys, further, told):
    raw = write([{"prompt": "Where?"}, {"prompt": "When?", **further}])
    for words in (["inspect", raw, "--html", tmp_path / "page.html"], ["prepare", raw, "--out", tmp_path / "out"]):
        assert cli.main(["data", *map(str, words)]) == 2
        assert f"error: {raw}:2: {told}" in capsys.readouterr().err
    off = ["--validation", "0", "--test", "0", "--on-error", "skip"]
    assert cli.main(["data", "prepare", str(raw), "--out", str(tmp_path / "out"), *off]) == 0
    assert lines(tmp_path / "out" / "train.jsonl") == [{"prompt": "Where?"}]


def test_of_many_further_fields_the_first_are_counted(write, capsys):
    assert cli.main(["data", "inspect", str(write([{"prompt": "a", **{f"f{n}": n for n in range(500)}}]))]) == 0
    assert capsys.readouterr().out.count("labels: ") == data_cli.MOST_FIELDS


def test_inspect_shows_a_file_and_writes_a_page(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    answers = ["<b>short</b>", "much longer than the other"]
    record = {"prompt": "Where in the wide world is it?", "completions": answers, "ranks": [1, 2], "user": "ann"}
    third = {
        **record,
        "completions": [*answers, "third one"],
        "ranks": [1, 2, 1],
        "prompt": "Wo ist denn der Bahnhof hier?",
    }
    page = tmp_path / "page.html"
    assert cli.main(["data", "inspect", str(write([record, record, third])), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    for words in ("comparisons", "K: completions of a prompt", "label balance", "languages", "same", "sample"):
        assert words in shown
    text = page.read_text()
    assert text.count("<svg") == 2 and text.count('class="bar"') >= 8 and "<h2>label balance</h2>" in text
    assert "<b>short" not in text and "http" not in text  # nothing of the data is markup, nothing is fetched
    ElementTree.fromstring(re.sub("<meta[^>]*>", "", text.removeprefix("<!doctype html>\n")))


def test_rankings_without_a_labeler_are_counted_where_others_have_one(write, capsys):
    record = {"prompt": "Where?", "completions": ["a", "b"], "ranks": [1, 1]}
    raw = write([{**record, "labeler": who} for who in ("ann", "ben", None, "")])
    assert cli.main(["data", "inspect", str(raw)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "labelers 2 rankings without a labeler 2" in shown and "records in which all tie 4 100.0 %" in shown
    write([record])
    assert cli.main(["data", "inspect", str(raw)]) == 0
    assert "without a labeler" not in capsys.readouterr().out


def test_a_histogram_s_bars_hold_every_number():
    numbers = array("Q", [*range(1, 101), 100_000])
    drawn = histogram(numbers)
    counts = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+)</title>", drawn)]
    assert sum(counts) == 101 and len(counts) <= 40 and "to 100,000: " in drawn
    assert [int(n) for n in re.findall(r": (\d+)</title>", histogram(array("Q", [5, 5, 5])))] == [3]


def test_rankings_are_counted_by_hand():
    rankings = data_cli.Rankings()
    rankings.add(["aa", "b"], [1, 2])  # earlier and longer one better
    rankings.add(["a", "bb", "c"], [2, 1, 2])  # 3 pairs, 1 tied; b beats a (later, longer) and c (earlier, longer)
    rankings.add(["a", "b"], [1, 1])
    assert (rankings.pairs, rankings.tied, rankings.all_tied) == (5, 2, 1)
    assert (rankings.first_better, rankings.longer_better, rankings.length_differs) == (2, 3, 3)
    assert rankings.sizes == {2: 2, 3: 1} and rankings.best == {1: 2, 2: 2} and rankings.ties == {0: 1, 1: 2}


def test_languages_are_told_apart():
    found = map(data_cli.language, ["Where is the station, please?", "Wo ist denn bitte der Bahnhof hier?", "hi"])
    assert list(found) == ["en", "de", "too short to tell"]


def test_a_sample_is_fair_and_repeats():
    counts = Counter()
    for seed in range(2000):
        sample = data_cli.Reservoir(2, seed)
        for n in range(10):
            sample.add(n)
        counts.update(sample.kept)
    assert all(320 < counts[n] < 480 for n in range(10))  # 400 each, sd 18
