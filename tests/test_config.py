"""Configuration: what is not understood is refused, by name, wherever it comes from."""

import dataclasses
import datetime
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf import config
from rlhf.config import STAGE_ARGS, ConfigError, PPOArgs, PretrainArgs, RewardArgs, SFTArgs, parse, to_dict

SHIPPED = [path for stage in STAGE_ARGS for path in sorted((ROOT / "configs" / stage).glob("*.yaml"))]
NO_PTX = ["--ptx_coef", "0"]


@pytest.fixture
def sft(tmp_path):
    """Parses YAML text and words of a command line as an SFT config."""

    def read(text="", *words):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return parse("sft", ["--config", str(path), *words])

    return read


def error_of(call, *arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ YAML and command line


def test_yaml_replaces_defaults_and_the_command_line_replaces_yaml(sft):
    args = sft("learning_rate: 1.0e-3\nseed: 7\n", "--seed", "8")
    assert (args.learning_rate, args.seed, args.num_train_epochs) == (1e-3, 8, 16.0)


def test_an_option_may_come_before_the_config(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 7")
    assert parse("sft", ["--seed", "8", "--config", str(tmp_path / "c.yaml")]).seed == 8


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "null"])
def test_an_empty_config_is_the_defaults(sft, text):
    assert sft(text) == SFTArgs()


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "1.0e-5", "0.00001", "+1e-5", "1_0e-6", ".1e-4"])
def test_each_way_to_write_a_float_is_one(sft, text):
    assert sft(f"learning_rate: {text}").learning_rate == pytest.approx(1e-5, rel=1e-12)
    assert parse("sft", ["--learning_rate", text]).learning_rate == pytest.approx(1e-5, rel=1e-12)


def test_an_int_is_a_float_where_a_float_belongs(sft):
    for args in (sft("num_train_epochs: 2"), parse("sft", ["--num_train_epochs", "2"]), SFTArgs(num_train_epochs=2)):
        assert args.num_train_epochs == 2.0 and type(args.num_train_epochs) is float


def test_negative_numbers_follow_an_option(sft):
    assert parse("sft", ["--max_steps", "-1"]).max_steps == -1
    assert (
        parse("ppo", [*NO_PTX, "--missing_eos_penalty", "null", "--missing_eos_score", "-1e0"]).missing_eos_score == -1
    )
    assert "must be >= 0, got -2.5" in error_of(parse, "sft", ["--weight_decay", "-.25e1"])


def test_dashes_are_underscores():
    assert parse("sft", ["--learning-rate", "1e-3", "--per-device-train-batch-size=4"]) == SFTArgs(
        learning_rate=1e-3, per_device_train_batch_size=4
    )


def test_a_dash_in_a_value_stays():
    assert parse("sft", ["--dataset-name=a-b", "--run-name", "x-y"]) == SFTArgs(dataset_name="a-b", run_name="x-y")


@pytest.mark.parametrize(
    "words, value",
    [(["--bf16"], True), (["--bf16", "true"], True), (["--bf16=false"], False), (["--bf16", "False"], False)],
)
def test_a_flag_alone_is_true(words, value):
    assert parse("sft", [*words, "--seed", "1"]).bf16 is value


@pytest.mark.parametrize("word", ["null", "none", "None"])
def test_null_on_the_command_line_takes_a_default_away(word):
    assert parse("ppo", [*NO_PTX, "--ema_decay", word]).ema_decay is None
    assert parse("sft", ["--dataset_name", word]).dataset_name is None


def test_words_of_a_text_option_stay_text():
    assert parse("sft", ["--run_name", "010", "--report_to", "1", "null"]) == SFTArgs(
        run_name="010", report_to=["1", "null"]
    )


@pytest.mark.parametrize("words", [["a", "b"], ["[a, b]"]])
def test_lists_on_the_command_line(words):
    assert parse("sft", ["--report_to", *words, "--seed", "1"]).report_to == ["a", "b"]


def test_lists_of_numbers_on_the_command_line():
    def weights(*words):
        return parse("ppo", [*NO_PTX, "--reward_functions", "a:b", "--reward_weights", *words]).reward_weights

    assert weights("1", "-.5e0") == weights("[1, -0.5]") == [1.0, -0.5]
    assert weights("-1", "1e-1") == [-1.0, 0.1]
    assert weights("null") is None
    assert "--reward_weights[1]: expected float, got 'x'" in error_of(weights, "1", "x")


def test_one_text_is_a_list_of_one(sft):
    assert sft("report_to: trackio").report_to == ["trackio"]
    assert parse("sft", ["--report_to"]).report_to == []


def test_a_mapping_on_the_command_line():
    assert parse("sft", ["--lr_scheduler_kwargs", "{min_lr_rate: 1e-1}"]).lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 7", encoding="utf-8-sig")
    assert parse("sft", ["--config", str(tmp_path / "c.yaml")]).seed == 7


def test_what_looks_like_a_date_or_a_time_is_text(sft):
    args = sft("run_name: 2024-01-01\ndataset_config: 12:30\ntraining_arguments: {a: 010, b: 2024-01-01 10:00:00}")
    assert (args.run_name, args.dataset_config) == ("2024-01-01", "12:30")
    assert args.training_arguments == {"a": "010", "b": "2024-01-01 10:00:00"}


def test_merge_keys_and_anchors_work(sft):
    text = "lr_scheduler_kwargs: &a {x: 1, y: 2}\ntraining_arguments: {<<: *a, y: 3}\n"
    assert sft(text).training_arguments == {"x": 1, "y": 3}


# ---------------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("seed: 2.7", "expected int, got 2.7"),
        ("seed: 2.0", "expected int, got 2.0"),
        ("seed: true", "expected int, got True"),
        ("seed: '2'", "expected int, got '2'"),
        ("seed: null", "expected int, got None"),
        ("seed:", "expected int, got None"),
        ("seed: [1]", "expected int, got [1]"),
        ("seed: {a: 1}", "expected int, got {'a': 1}"),
        ("seed: 010", "expected int, got '010'"),
        ("max_steps: 1:30", "expected int, got '1:30'"),
        ("learning_rate: true", "expected float, got True"),
        ("learning_rate: '1e-5'", "expected float, got '1e-5'"),
        ("bf16: 1", "expected bool, got 1"),
        ("bf16: 'true'", "expected bool, got 'true'"),
        ("run_name: 1", "expected str, got 1"),
        ("run_name: no", "expected str, got False"),
        ("dataset_name: 1", "expected str or null, got 1"),
        ("report_to: [a, 1]", "report_to[1]: expected str, got 1"),
        ("report_to: {a: 1}", "expected list[str], got {'a': 1}"),
        ("training_arguments: [a]", "expected dict[str, typing.Any], got ['a']"),
        ("training_arguments: null", "got None"),
        ("training_arguments: {1: 2}", "training_arguments key: expected str, got 1"),
        ("training_arguments: {a: {1: 2}}", "training_arguments.a key: expected str, got 1"),
        ("training_arguments: {a: !!set {b}}", "training_arguments.a: expected a number, text"),
        ("on_error: skp", "expected one of stop, skip, got 'skp'; did you mean skip?"),
        ("on_error: 1", "expected one of stop, skip, got 1"),
        ("max_train_samples: 1.5", "expected int or null, got 1.5"),
    ],
)
def test_yaml_values_of_another_type_are_refused_with_file_and_line(sft, line, complaint):
    message = error_of(sft, f"# first line\n{line}\n")
    assert complaint in message
    assert "c.yaml:2: " + line.split(":")[0] in message


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--seed", "2.7"], "--seed: expected int, got 2.7"),
        (["--seed", "true"], "--seed: expected int, got True"),
        (["--seed", ""], "--seed: expected int, got None"),
        (["--seed", "[1"], "--seed: cannot read the value '[1'"),
        (["--seed", "!!int x"], "--seed: cannot read the value"),
        (["--seed"], "expected one argument"),
        (["--bf16", "maybe"], "--bf16: expected bool, got 'maybe'"),
        (["--learning_rate", "fast"], "--learning_rate: expected float, got 'fast'"),
        (["--on_error", "Skip"], "--on_error: expected one of stop, skip, got 'Skip'; did you mean skip?"),
        (["--training_arguments", "a"], "--training_arguments: expected dict"),
        (["--learning-rate", "0"], "--learning_rate: must be > 0, got 0.0"),
    ],
)
def test_words_of_another_type_are_refused_with_the_option(words, complaint):
    assert complaint in error_of(parse, "sft", words)


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 2.0),
        ("seed", True),
        ("seed", None),
        ("learning_rate", "1e-5"),
        ("learning_rate", float("nan")),
        ("bf16", 0),
        ("report_to", ("a",)),
        ("training_arguments", {"a": [{"b": float("inf")}]}),
        ("training_arguments", {"a": datetime.date(2024, 1, 1)}),
        ("training_arguments", {"a": (1, 2)}),
        ("dtype", "float64"),
        ("run_name", ROOT),
    ],
)
def test_construction_in_python_is_checked_too(name, value):
    assert error_of(SFTArgs, **{name: value}).startswith(name)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "-1e999", "9" * 400])
def test_numbers_that_are_not_finite_are_refused_everywhere(sft, value):
    assert "not a finite number" in error_of(sft, f"learning_rate: {value}")
    assert "training_arguments.a.b[1]: " in error_of(sft, f"training_arguments: {{a: {{b: [0, {value}]}}}}")
    assert "not a finite number" in error_of(parse, "sft", [f"--learning_rate={value}"])


@pytest.mark.parametrize("word", ["nan", "inf", "NaN", "Infinity"])
def test_the_names_of_such_numbers_are_no_numbers(word):
    assert "expected float" in error_of(parse, "sft", ["--learning_rate", word])


def test_values_are_copied():
    given_to_both = {"a": 1}
    first, second = (SFTArgs(training_arguments=given_to_both) for _ in range(2))
    first.training_arguments["b"] = 2
    SFTArgs().report_to.append("x")
    assert second.training_arguments == given_to_both == {"a": 1} and SFTArgs().report_to == []


@pytest.mark.parametrize("stage", STAGE_ARGS)
def test_all_choices_can_be_written_as_json_and_read_again(stage):
    cls = STAGE_ARGS[stage]
    args = cls(**({"ptx_coef": 0.0} if cls is PPOArgs else {}), seed=3)
    assert cls(**json.loads(json.dumps(to_dict(args), allow_nan=False))) == args


# ----------------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "key, suggestion",
    [
        ("lerning_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("learning_rat", "learning_rate"),
        ("xyzzy", None),
    ],
)
def test_an_unknown_yaml_key_is_refused_with_line_and_closest_name(sft, key, suggestion):
    message = error_of(sft, f"seed: 1\n\n{key}: 1\n")
    assert f"c.yaml:3: unknown key '{key}'; " in message
    assert message.endswith(f"did you mean {suggestion}?" if suggestion else "see --help")


@pytest.mark.parametrize("key", ["1", "null", "yes", "2024-01-01", "[a]", "{a: 1}", "? [a, [b]]\n"])
def test_keys_that_are_not_names_are_refused(sft, key):
    assert "c.yaml" in error_of(sft, f"{key}: 1")


@pytest.mark.parametrize(
    "word, suggestion",
    [
        ("--lerning_rate", "--learning_rate"),
        ("--learning-rat=1", "--learning_rate"),
        ("--learning", None),
        ("--see", "--seed"),
        ("--conf", "--config"),
        ("-seed", "--seed"),
        ("--max_prompt_lenght", "--max_prompt_length"),
    ],
)
def test_unknown_and_abbreviated_options_are_refused_with_the_closest_name(word, suggestion):
    message = error_of(parse, "sft", [word, "1"])
    assert message.startswith(f"unknown option '{word.replace('g-r', 'g_r')}'")
    assert suggestion is None or message.endswith(f"did you mean {suggestion}?")


def test_a_word_too_many_is_refused():
    assert error_of(parse, "sft", ["--seed", "1", "2"]) == "unexpected word '2'"
    assert error_of(parse, "sft", ["demo.yaml"]) == "unexpected word 'demo.yaml'"


@pytest.mark.parametrize(
    "words", [["--seed", "1", "--seed", "1"], ["--run-name", "a", "--run_name=b"], ["--bf16", "--bf16"]]
)
def test_an_option_given_twice_is_refused(words):
    assert "is given twice" in error_of(parse, "sft", words)


def test_a_yaml_key_given_twice_is_refused_at_any_depth(sft):
    assert "c.yaml:2: the key 'seed' is given twice" in error_of(sft, "seed: 1\nseed: 1\n")
    assert "c.yaml:3: the key 'a' is given twice" in error_of(sft, "training_arguments:\n  a: 1\n  a: 2\n")
    assert "the key 'a' is given twice" in error_of(parse, "sft", ["--training_arguments", "{a: 1, a: 2}"])


def test_options_of_another_stage_are_unknown():
    assert "unknown option" in error_of(parse, "sft", ["--kl_coef", "0.1"])


# ---------------------------------------------------------------------------------------------------------------------- files


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert "nowhere.yaml" in error_of(parse, "sft", ["--config", "nowhere.yaml"])
    assert "cannot read the config" in error_of(parse, "sft", ["--config", str(tmp_path)])
    assert "cannot read the config" in error_of(parse, "sft", ["--config", "a\0b"])
    (tmp_path / "latin1.yaml").write_bytes(b"run_name: caf\xe9")
    assert "not UTF-8 at byte 13" in error_of(parse, "sft", ["--config", str(tmp_path / "latin1.yaml")])


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("- seed", "a config is a mapping of names to values, not a list"),
        ("seed", "not a str"),
        ("seed: 1\nx: [1,\n", "c.yaml:3: "),
        ("seed: 1\n\tx: 1", "c.yaml:2: "),
        ("seed: !!python/object/apply:os.getcwd []", "c.yaml:1: could not determine a constructor"),
        ("seed: 1\nbf16: !!bool x", "c.yaml:2: cannot read 'x' as bool"),
        ("seed: !!int x", "c.yaml:1: cannot read 'x' as int"),
        ("seed: !!timestamp x", "c.yaml:1: cannot read 'x' as timestamp"),
        ("seed: " + "9" * 5000, "c.yaml:1: "),
        ("seed: !!map x", "c.yaml:1: "),
        ("seed: 1\n---\nseed: 2", "c.yaml"),
        ("seed: " + "[" * 2000, "nested too deeply"),
        ("training_arguments: &a {b: *a}", "nested too deeply"),
        ("seed: \0", "c.yaml"),
    ],
    ids=range(14),
)
def test_files_that_are_no_config_are_refused(sft, text, complaint):
    assert complaint in error_of(sft, text)


# --------------------------------------------------------------------------------------------------------- bounds, cross-field


@pytest.mark.parametrize(
    "stage, words",
    [
        ("sft", ["--seed", "-1"]),
        ("sft", ["--seed", str(2**32)]),
        ("sft", ["--learning_rate", "0"]),
        ("sft", ["--adam_beta2", "1"]),
        ("sft", ["--eval_fraction", "0.95"]),
        ("sft", ["--save_steps", "0"]),
        ("sft", ["--max_steps", "-2"]),
        ("ppo", [*NO_PTX, "--temperature", "0"]),
        ("ppo", [*NO_PTX, "--gamma", "1.01"]),
        ("ppo", ["--ptx_coef", "-1"]),
        ("ppo", [*NO_PTX, "--kl_target", "0"]),
        ("pretrain", ["--vocab_size", "257"]),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(stage, words):
    assert words[-2] + ": must be" in error_of(parse, stage, words)


def test_bounds_themselves_are_in(sft):
    assert sft("seed: 0\neval_fraction: 0.9\nadam_beta1: 0\nmax_steps: -1\n").eval_fraction == 0.9
    assert "c.yaml:1: seed: must be >= 0, got -1" in error_of(sft, "seed: -1")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-a", ".a", "ä", "a\n"])
def test_run_names_that_are_no_folder_names_are_refused(name):
    assert error_of(SFTArgs, run_name=name).startswith("run_name: ")


@pytest.mark.parametrize(
    "cls, values, complaint",
    [
        (PPOArgs, {}, "ptx_coef is above 0 but ptx_dataset_name is not given"),
        (PPOArgs, {"ptx_coef": 0.0, "batch_size": 10, "num_mini_batches": 4}, "batch_size: 10 is not a multiple of"),
        (
            PPOArgs,
            {"ptx_coef": 0.0, "kl_target": 6.0, "kl_horizon": 100, "batch_size": 512},
            "kl_horizon: 100 episodes are",
        ),
        (PPOArgs, {"ptx_coef": 0.0, "kl_target": 6.0, "kl_coef": 0.0}, "kl_coef: 0 stays 0 whatever kl_target is"),
        (SFTArgs, {"max_steps": 0}, "max_steps: 0 would train nothing"),
        (PPOArgs, {"ptx_coef": 0.0, "missing_eos_score": -1.0}, "missing_eos_penalty and missing_eos_score exclude"),
        (PretrainArgs, {"hidden_size": 30, "num_attention_heads": 4}, "hidden_size: 30 is not a multiple of"),
        (PretrainArgs, {"block_size": 512}, "block_size: 512 is longer than max_position_embeddings (256)"),
        (PretrainArgs, {"tokenizer_vocab_file": "v"}, "tokenizer_vocab_file and tokenizer_merges_file go together"),
        (PretrainArgs, {"tokenizer_merges_file": "m"}, "tokenizer_vocab_file and tokenizer_merges_file go together"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(cls, values, complaint):
    assert complaint in error_of(cls, **values)
    words = [f"--{name}={value}" for name, value in values.items()] or ["--seed", "1"]
    assert complaint in error_of(parse, cls.stage, words)


def test_what_follows_from_choices():
    args = PPOArgs(ptx_coef=0.0, batch_size=64, num_mini_batches=4, total_episodes=1000)
    assert (args.mini_batch_size, args.num_rollouts) == (16, 16)
    assert SFTArgs().scheduler_kwargs == {"min_lr_rate": 0.1}
    assert SFTArgs(lr_scheduler_type="linear").scheduler_kwargs == {}
    assert RewardArgs(lr_scheduler_kwargs={}).scheduler_kwargs == {}


# ------------------------------------------------------------------------------------------------- no argument, shipped configs


@pytest.mark.parametrize("stage", STAGE_ARGS)
def test_no_argument_is_the_demo_recipe(stage, tmp_path, monkeypatch):
    folder = tmp_path / "configs" / stage
    folder.mkdir(parents=True)
    (folder / "demo.yaml").write_text("run_name: from_the_demo\n" + ("ptx_coef: 0\n" if stage == "ppo" else ""))
    monkeypatch.setattr(config, "__file__", str(tmp_path / "src" / "rlhf" / "config.py"))
    monkeypatch.setattr(sys, "argv", [f"{stage}.py"])
    assert parse(stage).run_name == parse(stage, []).run_name == "from_the_demo"


def test_no_argument_and_no_recipe_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "__file__", str(tmp_path / "lib" / "rlhf" / "config.py"))
    monkeypatch.chdir(tmp_path)
    assert "give --config FILE" in error_of(parse, "sft", [])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_configs_parse(path):
    args = parse(path.parent.name, ["--config", str(path)])
    assert args.run_name != "default"


@pytest.mark.parametrize("stage", STAGE_ARGS)
def test_each_stage_ships_a_demo_recipe(stage):
    assert config.demo_config(stage).is_relative_to(ROOT)


# ----------------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("stage", STAGE_ARGS)
def test_help_names_every_option_with_its_default_within_120_columns(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(stage, ["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert max(map(len, text.splitlines())) <= 120
    entries = {part.split()[0]: " ".join(part.split()) for part in text.split("\n  --")[1:]}
    for spec in dataclasses.fields(STAGE_ARGS[stage]):
        assert " ".join(spec.metadata["help"].split()) in entries[spec.name]
        assert "default: " in entries[spec.name], spec.name
    assert "(default: 9.65e-06)" in text or stage != "sft"


def test_help_imports_nothing_heavy():
    program = "from rlhf.config import parse; parse('ppo', ['--help'])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "yaml" in modules and not modules & {"torch", "transformers", "numpy", "trl", "accelerate", "datasets"}


# ------------------------------------------------------------------------------------------------------------ anything at all

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.sampled_from([spec.name for spec in dataclasses.fields(PPOArgs)])
YAML_SIGNS = (
    """: |- |[|]|{|}|,|'|"|&a |*a|? |<<|%|---|...|#|1|1e5|.nan|null|true|=|!!int |!!float |!!bool |!!map |!!seq """
)
yaml_bits = st.sampled_from([*YAML_SIGNS.split("|"), "!!set ", "!!binary ", "!!timestamp ", "| ", "\n", "\n  ", "\t"])
yaml_texts = st.lists(names | yaml_bits | st.text(max_size=3), max_size=12).map("".join)


@relaxed
@given(text=yaml_texts)
def test_any_yaml_gives_a_config_or_a_config_error(text, tmp_path):
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        args = parse("ppo", ["--config", str(path), *NO_PTX])
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        json.dumps(to_dict(args), allow_nan=False)


@relaxed
@given(
    argv=st.lists(
        names.map(lambda name: f"--{name}")
        | st.tuples(names, yaml_texts).map(lambda pair: f"--{pair[0]}={pair[1]}")
        | st.sampled_from(["--", "-", "-h", "--help", "--config", "-1", "--no-bf16", "-c", "@file"])
        | yaml_texts,
        min_size=1,
        max_size=6,
    )
)
def test_any_command_line_gives_a_config_or_a_config_error(argv, capsys):
    try:
        parse("ppo", argv)
    except SystemExit as stopped:
        assert stopped.code == 0 and any(word.startswith(("-h", "--help")) for word in argv)
    except ConfigError:
        pass
    capsys.readouterr()


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
)


@relaxed
@given(name=names, value=values)
def test_any_value_in_python_is_of_the_field_s_type_or_refused(name, value):
    try:
        args = PPOArgs(**{"ptx_coef": 0.0, name: value})
    except ConfigError:
        return
    kept = getattr(args, name)
    assert kept == value or kept == [value]
    assert type(kept) is type(value) or (type(kept), type(value)) in {(float, int), (list, str)}


def test_a_token_never_enters_a_config():
    with pytest.raises(ConfigError, match="hub_token does not belong in a config"):
        SFTArgs(training_arguments={"hub_token": "hf_secret"})
