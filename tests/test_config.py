import dataclasses
import re

import pytest
import yaml

from megamtp.config import config_dataclass, describe, dump, from_dict, leaves, load, option, parse_overrides, to_dict
from megamtp.errors import UserError, exits_cleanly
from megamtp.training.run_config import RunConfig

BASE = {
    "run_dir": "runs/x",
    "model": {"vocab_size": 100, "dim": 64, "n_layers": 4, "n_heads": 4, "n_future_tokens": 2},
    "data": {"train": "data/train"},
    "training": {"steps": 10, "global_batch_size": 4},
}


@pytest.fixture
def read(tmp_path):
    """``read("--a.b", "1", model={...})``: BASE with sections changed, as a file, and overrides."""

    def read(*overrides, text=None, **sections):
        path = tmp_path / "run.yaml"
        values = {**BASE, **{name: _merged(BASE.get(name), value) for name, value in sections.items()}}
        path.write_text(yaml.safe_dump(values) if text is None else text)
        return load(RunConfig, path, list(overrides))

    return read


def _merged(old, new):
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


@pytest.fixture
def refusal(read):
    """The message of the ``UserError``, which is one line."""

    def refusal(*overrides, **sections):
        with pytest.raises(UserError) as error:
            read(*overrides, **sections)
        message = str(error.value)
        assert "\n" not in message and message
        return message

    return refusal


def test_file_alone(read):
    config = read()
    assert config.run_dir == "runs/x" and config.model.dim == 64 and config.training.steps == 10
    assert config.heads.mode is None and config.model.n_kv_heads is None


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["--model.dim", "128"], "model.dim", 128),
        (["--model.dim=128"], "model.dim", 128),
        (["--optimizer.lr", "3e-4"], "optimizer.lr", 3e-4),
        (["--training.seed", "1", "--training.seed=2"], "training.seed", 2),  # the last one wins
        (["--model.n_kv_heads", "null"], "model.n_kv_heads", None),
        (["--model.n_kv_heads", "~"], "model.n_kv_heads", None),
        (["--heads.loss_weights", "[1, 0.5]"], "heads.loss_weights", [1.0, 0.5]),
        (["--heads.loss_weights=null"], "heads.loss_weights", None),
        (["--run_dir", "some where=else"], "run_dir", "some where=else"),
        (["--run_dir=a=b"], "run_dir", "a=b"),
        (["--data.document_attention", "true"], "data.document_attention", True),
        (["--parallel.zero_stage", "0"], "parallel.zero_stage", 0),  # a section that the file does not have
    ],
)
def test_overrides(read, overrides, path, value):
    config = read(*overrides, model={"n_kv_heads": 2}, heads={"loss_weights": [3, 4]})
    for name in path.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


def test_overrides_leave_the_rest(read):
    changed = read("--model.dim", "128")
    assert dataclasses.replace(changed, model=dataclasses.replace(changed.model, dim=64)) == read()


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "'3e-4'"])
def test_exponent_without_a_point_is_a_float(read, text):
    """YAML 1.1 reads 3e-4 as a string."""
    config = read(text=yaml.safe_dump(BASE) + f"optimizer:\n  lr: {text}\n")
    assert config.optimizer.lr == 3e-4 and isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"model": {"vocab_sise": 3}}, ["unknown key model.vocab_sise", "did you mean model.vocab_size?"]),
        (
            {"training": {"global_batchsize": 3}},
            ["training.global_batchsize", "did you mean training.global_batch_size?"],
        ),
        ({"optimiser": {"lr": 3}}, ["unknown key optimiser", "did you mean optimizer?"]),
        ({"micro_batch_size": 3}, ["unknown key micro_batch_size", "did you mean training.micro_batch_size?"]),
        ({"lr": 3}, ["unknown key lr", "did you mean optimizer.lr?"]),
        ({"model": {7: 3}}, ["unknown key model.7"]),
    ],
)
def test_unknown_key_in_the_file(refusal, sections, parts):
    message = refusal(**sections)
    assert "run.yaml: " in message and all(part in message for part in parts)


def test_nothing_near_no_suggestion(refusal):
    assert refusal(zzzzzz=1).endswith("unknown key zzzzzz")


@pytest.mark.parametrize(
    ("key", "near"),
    [("model.dimm", "model.dim"), ("modle.dim", "model"), ("dim", "model.dim"), ("training.warmup", None)],
)
def test_unknown_key_on_the_command_line(refusal, key, near):
    message = refusal(f"--{key}", "3")
    assert message.startswith("command line: unknown key ")
    assert near is None or message.endswith(f"did you mean {near}?")


@pytest.mark.parametrize(("section", "key", "right"), [("model", "seq_len", "data"), ("training", "lr", "optimizer")])
def test_key_of_another_section(refusal, section, key, right):
    assert f"did you mean {right}.{key}?" in refusal(**{section: {key: 8}})


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"model": {"dim": "wide"}}, ["model.dim", "integer", "'wide'"]),
        ({"model": {"dim": 64.5}}, ["model.dim", "integer", "64.5"]),
        ({"model": {"dim": [64]}}, ["model.dim", "integer", "[64]"]),
        ({"model": {"dim": {"x": 64}}}, ["model.dim", "integer"]),
        ({"model": {"n_layers": None}}, ["model.n_layers", "integer", "None"]),
        ({"model": {"dim": 0}}, ["model.dim", "greater than or equal to 1", "0"]),
        ({"optimizer": {"lr": 0}}, ["optimizer.lr", "greater than 0"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer.lr", "number", "'fast'"]),
        ({"optimizer": {"beta2": 1.0}}, ["optimizer.beta2", "less than 1"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr"]),
        ({"parallel": {"zero_stage": 9}}, ["parallel.zero_stage", "9"]),
        ({"heads": {"mode": "fast"}}, ["heads.mode", "'sequential'", "'fast'"]),
        ({"heads": {"loss_weights": ["a", 1]}}, ["heads.loss_weights.0", "number"]),
        ({"data": {"mask_cross_document_targets": "perhaps"}}, ["data.mask_cross_document_targets", "boolean"]),
        ({"run_dir": ["a"]}, ["run_dir", "string"]),
        ({"data": {"train": 7}}, ["data.train: ", "valid string", "valid list", "got 7"]),
        ({"data": {"train": [{"path": "x", "weight": -1}]}}, ["data.train.0.weight: ", "greater than or equal to 0"]),
        ({"data": {"train": [{"path": "x"}, {"weight": 1}]}}, ["data.train.1.path is missing"]),
        (
            {"data": {"train": [{"path": "x", "wieght": 1}]}},
            ["unknown key data.train.0.wieght", "data.train.0.weight?"],
        ),
        ({"data": {"stages": [{"from_tokens": 0, "weights": [1]}]}}, ["data.stages.0.from_tokens: "]),
        ({"model": 5}, ["model", "5"]),
    ],
)
def test_wrong_values(refusal, sections, parts):
    message = refusal(**sections)
    assert "run.yaml: " in message and all(part in message for part in parts)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"model": {"n_future_tokens": 4}}, ["model: ", "must be smaller than n_layers"]),
        ({"heads": {"loss_weights": [1, 2, 3]}}, ["heads.loss_weights has 3 entries; model.n_future_tokens is 2"]),
        ({"heads": {"loss_weights": []}}, ["heads.loss_weights has 0 entries"]),
        ({"schedule": {"warmup_steps": 11}}, ["schedule.warmup_steps 11 exceeds training.steps 10"]),
        ({"data": {"train": []}}, ["data.train is an empty list"]),
        ({"data": {"train": [{"path": "x", "weight": 0}]}}, ["data.train: all weights are 0"]),
        ({"data": {"train": [{"path": "x"}, {"path": "x"}]}}, ["data.train: ['x', 'x'] names a set twice"]),
        ({"data": {"stages": [{"from_tokens": 10**6, "weights": [1, 2]}]}}, ["2 weights for the 1 sets of data.train"]),
        ({"data": {"stages": [{"from_tokens": 10**6, "weights": [0]}]}}, ["all weights from 1000000 tokens on are 0"]),
        ({"data": {"stages": [{"from_tokens": 1, "weights": [1]}]}}, ["from_tokens must rise", "by a sample"]),
        ({"data": {"validation": "v", "validation_fraction": 0.1}}, ["exclude each other"]),
        ({"data": {"validation": [{"path": "a/v"}, {"path": "b/v"}]}}, ["data.validation: names ['v', 'v']"]),
        (
            {"training": {"precision": "bf16"}, "parallel": {"zero_stage": 0}},
            ["training.precision bf16 needs", "--parallel.zero_stage 1"],
        ),
    ],
)
def test_values_that_do_not_go_together(refusal, sections, parts):
    message = refusal(**sections)
    assert "run.yaml: " in message and all(part in message for part in parts)
    assert "Value error" not in message


def test_values_that_do_go_together(read):
    for precision, zero_stage in (("bf16", 1), ("fp32", 0)):
        config = read(training={"precision": precision}, parallel={"zero_stage": zero_stage})
        assert (config.training.precision, config.parallel.zero_stage) == (precision, zero_stage)
    config = read(heads={"loss_weights": [1, 2]}, schedule={"warmup_steps": 10})
    assert (config.heads.loss_weights, config.schedule.warmup_steps) == ([1, 2], 10)


def test_mistake_in_an_override_says_so(refusal):
    assert "run.yaml with overrides: model.dim: " in refusal("--model.dim", "wide")


@pytest.mark.parametrize(("section", "missing"), [("model", "vocab_size"), ("training", "steps"), ("data", "train")])
def test_missing_key(refusal, section, missing):
    text = yaml.safe_dump({**BASE, section: {k: v for k, v in BASE[section].items() if k != missing}})
    message = refusal(text=text)
    assert f"{section}.{missing} is missing" in message and f"--{section}.{missing} VALUE" in message


def test_missing_key_given_as_override(read):
    text = yaml.safe_dump({**BASE, "data": {}})
    assert read("--data.train", "elsewhere", text=text).data.train == "elsewhere"


@pytest.mark.parametrize("text", ["model: [1, 2", "a: b: c", "\tmodel: 3", "x: &a *b"])
def test_broken_yaml(refusal, text):
    assert "run.yaml: not valid YAML: " in refusal(text=text)


def test_file_of_bytes(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="run.yaml: not valid YAML: "):
        load(RunConfig, tmp_path / "run.yaml", [])


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "list"), ("word", "str"), ("5", "int")])
def test_file_that_is_no_mapping(refusal, text, found):
    assert refusal(text=text).endswith(f"expected a mapping of sections, found {found}")


def test_empty_file(refusal):
    assert "run_dir is missing" in refusal(text="")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"{path}: cannot read the config: ")) as error:
            load(RunConfig, path, [])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dim", "3"], "unexpected 'model.dim'"),
        (["--model.dim"], "--model.dim needs a value"),
        (["-x", "3"], "unexpected '-x'"),
        (["--model.dim", "64", "extra"], "unexpected 'extra'"),
        (["--heads.loss_weights", "[1, 2"], "cannot read the value '[1, 2'"),
    ],
)
def test_overrides_that_cannot_be_read(refusal, overrides, message):
    assert message in refusal(*overrides)


def test_parse_overrides():
    arguments = ["--a.b", "1", "--c=2", "--d=", "--e", "-3"]
    assert parse_overrides(arguments) == [("a.b", "1"), ("c", "2"), ("d", ""), ("e", "-3")]
    assert len(arguments) == 6  # the caller's list stays


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"heads": {"mode": "joint", "loss_weights": [1, 0.3]}, "optimizer": {"lr": 3e-4, "eps": 1e-12}},
        {"model": {"n_kv_heads": 2, "rope_theta": 1e6}, "training": {"precision": "bf16", "eval_every": 5}},
        {"run_dir": "a: b # c", "data": {"train": "012", "validation": "null"}},  # strings that YAML would misread
    ],
)
def test_dump_and_load(read, tmp_path, sections):
    config = read(**sections)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml", []) == config
    assert from_dict(RunConfig, to_dict(config), "again") == config


def test_describe_lists_every_leaf():
    lines = describe(RunConfig).splitlines()
    keys = [line.split()[0] for line in lines]

    def walk(values, prefix=""):
        for key, value in values.items():
            yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"--{prefix}{key}"]

    assert keys == list(walk(to_dict(from_dict(RunConfig, BASE, "base"))))
    text = dict(zip(keys, lines, strict=True))
    assert "required" in text["--model.vocab_size"] and "INT" in text["--model.vocab_size"]
    assert "sequential|joint|naive" in text["--heads.mode"] and "default null" in text["--heads.mode"]
    assert "default 0.0003" in text["--optimizer.lr"]
    assert "default null" in text["--model.n_kv_heads"]


def test_null_as_the_help_spells_it(read):
    assert read("--model.n_kv_heads", "null", model={"n_kv_heads": 2}).model.n_kv_heads is None


def test_a_blend_in_the_file_on_the_command_line_and_back(read, tmp_path):
    blend = [{"path": "a", "weight": 0.3}, {"path": "b"}]
    by_file = read(data={"train": blend, "validation": [{"path": "v/a", "name": "one"}]})
    by_option = read(
        "--data.train", "[{path: a, weight: 0.3}, {path: b}]", "--data.validation=[{path: v/a, name: one}]"
    )
    assert by_file == by_option and [source.weight for source in by_file.data.sources] == [0.3, 1.0]
    (tmp_path / "dumped.yaml").write_text(dump(by_file))
    assert load(RunConfig, tmp_path / "dumped.yaml", []) == by_file


@pytest.mark.parametrize("name", ["2024", "2024-05-01", "007"])
def test_name_of_digits_on_the_command_line(read, name):
    """A string on the command line is what the user typed."""
    assert read("--run_dir", name).run_dir == name


@pytest.mark.parametrize("where", ["file", "override"])
def test_impossible_date(refusal, where):
    if where == "file":
        assert "run.yaml" in refusal(text="run_dir: 2024-13-45\n")
    else:
        assert "model.dim" in refusal("--model.dim", "2024-13-45")


def test_empty_section_takes_its_defaults(read):
    assert read(text=yaml.safe_dump(BASE) + "heads:\n  # mode: joint\n").heads.mode is None


def test_every_leaf_of_the_run_has_help():
    without = [key for key, field, _ in leaves(RunConfig) if not field.metadata.get("help")]
    assert not without


def test_config_is_frozen_and_defaults_are_not_shared(read):
    @config_dataclass
    class Lists:
        values: list[int] = option([1, 2], "a list")

    first, second = Lists(), Lists()
    assert first.values == [1, 2] and first.values is not second.values
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().run_dir = "other"


def test_command_turns_the_error_into_one_line_and_exit_code_2(read, capsys):
    @exits_cleanly
    def main():
        read(zzzzzz=1)

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
