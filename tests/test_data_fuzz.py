"""Whatever stands in a file, `rlhf data inspect` and `rlhf data prepare` do their work or say in one line what is wrong."""

import gzip
import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings
from test_data_load import FIELD, JSON, NEAR, SUFFIX

from rlhf import cli

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(max_size=30) | st.sampled_from(
    ["Where?", "a@b.org", "+1 202 555 0129", "\ud800", "你好", "\x00", "\ue0000\ue001", "a\u2028b", "4111111111111111"]
)
ANSWERS = st.lists(TEXT, min_size=1, max_size=4)
RECORD = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT}, optional={"user": TEXT, "area": NEAR}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "completions": ANSWERS, "ranks": st.lists(st.integers(0, 4), max_size=4)}),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}))}
    ),
    st.dictionaries(FIELD, NEAR, max_size=6),
)


@pytest.fixture
def command(tmp_path, capsys):
    """Runs both commands on a file; what is wrong with how they end, "" where nothing is: each says something, or fails in
    one line and leaves nothing."""

    def command(path, on_error):
        for name, *more in (("inspect", "--html", "page.html"), ("prepare", "--out", "out")):
            written = tmp_path / more[1]
            code = cli.main(["data", name, str(path), "--on-error", on_error, more[0], str(written)])
            said = capsys.readouterr()
            if code == 2:
                if not (said.err.startswith("error: ") and len(said.err.splitlines()) == 1):
                    return f"{name} fails with {said.err!r}"
                if written.exists() or list(tmp_path.glob(".*")):
                    return f"{name} fails and leaves something"
            elif code or not said.out:
                return f"{name} ends with {code} and says {said.out!r}"
            else:
                for file in written.iterdir() if written.is_dir() else []:
                    file.unlink()
                written.rmdir() if written.is_dir() else written.unlink()
        return ""

    return command


@FUZZ
@given(records=st.lists(RECORD, max_size=4), on_error=st.sampled_from(["stop", "skip"]), as_lines=st.booleans())
@example(
    records=[{"prompt": "0"}, {"prompt": "0", "completions": [""], "ranks": [0, 1]}], on_error="stop", as_lines=False
)
@example(records=[{"prompt": "0"}, {"prompt": "0", "completions": 5, "ranks": 1}], on_error="stop", as_lines=True)
def test_records(tmp_path, command, records, on_error, as_lines):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, records)) if as_lines else json.dumps(records))
    assert command(path, on_error) == ""


@FUZZ
@given(
    content=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()), suffix=SUFFIX, cut=st.integers(0, 9)
)
def test_bytes(tmp_path, command, content, suffix, cut):
    path = tmp_path / f"a.{suffix}"
    if cut:
        path = tmp_path / f"a.{suffix}.gz"
        content = gzip.compress(content)[: -cut + 1 or None]
    path.write_bytes(content)
    assert command(path, "skip") == ""
