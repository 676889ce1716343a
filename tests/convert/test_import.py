"""What comes in: Llamas of transformers, our own exports, Meta's layout; and a run that trains on from it."""

import filecmp
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamtp.convert.export import export
from megamtp.convert.huggingface import from_llama_state_dict
from megamtp.convert.import_run import import_run
from megamtp.convert.source import open_source
from megamtp.errors import UserError
from megamtp.model.model import build_model, logical_parameters
from tests.convert import meta
from tests.convert.models import config_of_run, foreign_llama, parameters_of, stripped, write_run
from tests.distributed import run_ranks
from tests.training.tiny import lines, newest, run_config, run_training, tensors, write_corpus

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def model_of(source):
    model = build_model(source.config, seed=None).requires_grad_(False)
    for name, parameter in logical_parameters(model):
        parameter[: source.shape(name)[0]].copy_(source.tensor(name))
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("n", "dtype", "tokenizer"),
    [(4, "bf16", "bytes"), (4, "fp32", "file"), (4, "fp16", "none"), (1, "bf16", "file"), (1, "fp32", "none")],
)
def test_out_in_and_out_again_is_the_same_to_the_byte(tmp_path, n, dtype, tokenizer):
    config = config_of_run(vocab_size=257, n_layers=n + 2, n_future_tokens=n)
    run_dir = write_run(tmp_path / "run", config, parameters_of(config))
    if tokenizer != "bytes":
        (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace(": bytes", ": null"))
    given = None
    if tokenizer == "file":
        export(write_run(tmp_path / "other", config, parameters_of(config)), tmp_path / "made")
        given = tmp_path / "made" / "tokenizer.json"
    export(run_dir, tmp_path / "first", dtype=DTYPES[dtype], tokenizer=given, shard_bytes=20_000)
    import_run(tmp_path / "first", tmp_path / "imported")
    export(tmp_path / "imported", tmp_path / "second", dtype=DTYPES[dtype], shard_bytes=20_000)
    first, second = files(tmp_path / "first"), files(tmp_path / "second")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert ("tokenizer.json" in first) == (tokenizer != "none")
    # And what was imported is what was exported, not what two conversions lose alike.
    imported = newest(tmp_path / "imported")
    for name, value in parameters_of(config).items():
        value = stripped(name, value, config).to(DTYPES[dtype]).float()
        assert torch.equal(stripped(name, imported.tensor(name), config), value), name
        assert not imported.tensor(name)[len(value) :].any()
    imported.verify()


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_llama_keeps_its_logits(tmp_path, tied):
    theirs = foreign_llama(tmp_path / "llama", tie_word_embeddings=tied)
    import_run(tmp_path / "llama", tmp_path / "run", n_future_tokens=3)
    source = open_source(tmp_path / "run")
    assert (source.config.n_layers, source.config.n_future_tokens) == (5, 3)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = model_of(source)(tokens)[..., :50]
    for head in ours:  # copies of the last layer: every head predicts the next token
        assert (head - theirs(tokens).logits).abs().max() < 1e-5
    assert theirs(tokens).logits.std() > 0.1
    export(tmp_path / "run", tmp_path / "back", dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    state = theirs.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_random_heads(tmp_path):
    theirs = foreign_llama(tmp_path / "llama")
    for seed in (0, 1):
        import_run(tmp_path / "llama", tmp_path / f"run{seed}", n_future_tokens=3, new_heads="random", seed=seed)
    ours, other = newest(tmp_path / "run0"), newest(tmp_path / "run1")
    config = open_source(tmp_path / "run0").config
    fresh = dict(logical_parameters(build_model(config, seed=0)))
    kept = from_llama_state_dict(theirs.state_dict(), open_source(tmp_path / "llama").config)
    for name, value in tensors(ours).items():
        is_new = name.startswith(("heads.1.", "heads.2."))
        assert torch.equal(value, fresh[name] if is_new else kept[name]), name
        assert torch.equal(value, other.tensor(name)) == (not is_new or "norm" in name)


def test_fewer_heads(tmp_path):
    config = config_of_run(vocab_size=257)
    parameters = parameters_of(config)
    import_run(write_run(tmp_path / "run", config, parameters), tmp_path / "two", n_future_tokens=2)
    ours = newest(tmp_path / "two")
    assert ours.manifest["model"] | {"n_layers": 6, "n_future_tokens": 4} == vars(config)
    wanted = {name for name in parameters if not name.startswith(("heads.2.", "heads.3."))}
    assert set(ours.manifest["tensors"]) == wanted
    assert torch.equal(ours.tensor("heads.1.ffn_norm.weight"), parameters["heads.1.ffn_norm.weight"])


def test_heads_with_unembeddings_of_their_own(tmp_path):
    """Through an export and back: the same; more heads get copies of head 1's, fewer leave theirs behind."""
    config = config_of_run(vocab_size=257, replicated_unembedding=True)
    parameters = parameters_of(config)
    run = write_run(tmp_path / "run", config, parameters)
    export(run, tmp_path / "out", dtype=torch.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["replicated_unembedding"] is True
    import_run(tmp_path / "out", tmp_path / "back")
    (tmp_path / "out" / "megamtp.json").unlink()  # config.json alone knows it, too
    import_run(tmp_path / "out", tmp_path / "again")
    for folder in ("back", "again"):
        ours = newest(tmp_path / folder)
        assert ours.manifest["model"]["replicated_unembedding"] is True
        assert set(ours.manifest["tensors"]) == set(parameters)
        for name in parameters:
            assert torch.equal(stripped(name, ours.tensor(name), config), stripped(name, parameters[name], config)), (
                name
            )
    for n in (2, 6):
        import_run(run, tmp_path / f"{n}", n_future_tokens=n)
        ours = newest(tmp_path / f"{n}")
        held = [name for name in ours.manifest["tensors"] if name.startswith("output.")]
        assert sorted(held) == [f"output.{k}.weight" for k in range(n)]
        for k in range(n):
            expected = parameters[f"output.{k if k < 4 else 0}.weight"]
            assert torch.equal(ours.tensor(f"output.{k}.weight")[:257], expected[:257])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_metas_layout(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in meta.checkpoint().items()}
    meta.save(tmp_path / "meta", state)
    tokens = torch.randint(meta.VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = meta.logits(state, tokens)
    source = open_source(tmp_path / "meta")
    assert (source.config.n_layers, source.config.n_trunk_layers, source.config.n_future_tokens) == (5, 2, 3)
    assert source.tensor("layers.0.attention.wq.weight").dtype == dtype
    assert expected.std() > 0.5
    assert (model_of(source).double()(tokens)[..., : meta.VOCAB] - expected).abs().max() < 1e-5
    import_run(tmp_path / "meta", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (theirs(tokens).logits.double() - expected[0]).abs().max() < 1e-4 * expected.abs().max()
    # Blocks of rows that begin inside a head and end inside another.
    whole = source.tensor("layers.0.attention.wk.weight")
    assert torch.equal(torch.cat([source.rows("layers.0.attention.wk.weight", i, i + 1) for i in range(16)]), whole)


@pytest.mark.parametrize(
    ("params", "change", "message"),
    [
        ({"n_future_tokens": 4}, {}, "n_future_tokens 4"),
        ({"n_layers": 6}, {}, "n_layers 6"),
        ({}, {"layers.0.attention.wq.bias": torch.zeros(32)}, "unknown tensor layers.0.attention.wq.bias"),
        ({}, {"layers.1.ffn_norm.weight": torch.zeros(31)}, "has shape"),
        ({}, {"layers.0.attention.wk.weight": None}, "lacks layers.0.attention.wk.weight"),
        ({}, {"extra_heads.1.ffn_norm.weight": None}, "lacks extra_heads.1.ffn_norm.weight"),
        ({"dim": None}, {}, "dim"),
        ({"n_heads": 0}, {}, "n_heads"),
    ],
)
def test_metas_files_that_do_not_go_together(tmp_path, params, change, message):
    state = {name: value for name, value in (meta.checkpoint() | change).items() if value is not None}
    meta.save(tmp_path, state, **params)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_metas_file_cut_short(tmp_path):
    meta.save(tmp_path, meta.checkpoint())
    file = tmp_path / "consolidated.pth"
    for content in (file.read_bytes()[:-500], b"", b"\x80\x04no pickle"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="consolidated.pth: cannot be read"):
            open_source(tmp_path)


def test_a_tokenizer_folder_comes_along(tmp_path):
    config = config_of_run(vocab_size=257)
    export(write_run(tmp_path / "run", config, parameters_of(config)), tmp_path / "made")
    foreign_llama(tmp_path / "llama", vocab_size=257, eos_token_id=256)
    AutoTokenizer.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "llama")
    import_run(tmp_path / "llama", tmp_path / "imported")
    same, differ, lost = filecmp.cmpfiles(
        tmp_path / "llama", tmp_path / "imported/tokenizer", ["tokenizer.json", "tokenizer_config.json"], shallow=False
    )
    assert len(same) == 2 and not differ and not lost
    source = open_source(tmp_path / "imported")
    assert source.eos_id == 256 and source.context == 2048
    assert AutoTokenizer.from_pretrained(source.tokenizer)("ab")["input_ids"] == [97, 98]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero_stage": 0}),
        (2, {"parallel.zero_stage": 1, "training.precision": "bf16"}),
        pytest.param(2, {"parallel.zero_stage": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_goes_on_from_imported_weights(tmp_path, world_size, layout):
    """A run of 2 steps from an import computes the losses of the imported model, not of a fresh one."""
    write_corpus(tmp_path / "corpus" / "train", 60, seed=0)
    write_corpus(tmp_path / "corpus" / "validation", 15, seed=1)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    theirs = foreign_llama(tmp_path / "llama", **sizes)
    import_run(tmp_path / "llama", tmp_path / "run", n_future_tokens=2)
    model = yaml.safe_load((tmp_path / "run" / "model.yaml").read_text())["model"]
    changes = {f"model.{key}": value for key, value in model.items()} | layout
    changes |= {"training.steps": 2, "optimizer.lr": 1e-9, "schedule.warmup_steps": 0}
    config = run_config(tmp_path / "run", tmp_path / "corpus", changes)
    assert run_ranks(world_size, run_training, config) == [0] * world_size
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    # The same data in a fresh run, whose losses are others; transformers tells what the imported ones are.
    from megamtp.data.loader import validation_batches
    from megamtp.training.loop import open_run_data

    data = open_run_data(config).validation["validation"]
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    with torch.no_grad():
        for batch in validation_batches(data, 2, 0, 1, data.samples_per_epoch):
            if batch is None:
                continue
            found = theirs(torch.as_tensor(batch.inputs).long()).logits.double().log_softmax(-1)
            targets = torch.as_tensor(batch.targets(True)).long()
            for k in range(2):
                valid = targets[k] != -100
                sums[k] -= found.gather(-1, targets[k].clamp_min(0)[..., None])[..., 0][valid].sum()
                counts[k] += valid.sum()
    told = [line for line in lines(tmp_path / "run") if "validation_loss_per_head" in line][-1]
    tolerance = 2e-2 if "training.precision" in layout else 1e-4
    assert told["validation_loss_per_head"] == pytest.approx((sums / counts).tolist(), rel=tolerance)
    # What it saves is an ordinary checkpoint, whose card says where it began.
    assert newest(tmp_path / "run").manifest.get("moments", True)
    source = open_source(tmp_path / "run")
    assert source.facts["step"] == 2 and source.facts["started_from"] == "llama"
    with pytest.raises(UserError, match="--force does not replace it"):
        import_run(tmp_path / "llama", tmp_path / "run", force=True)


def test_moments_of_imported_weights_begin_at_zero(tmp_path):
    foreign_llama(tmp_path / "llama")
    import_run(tmp_path / "llama", tmp_path / "run")
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000000/manifest.json").read_text())
    assert manifest["moments"] is False and manifest["optimizer_steps"] == 0 and manifest["step"] == 0
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000000"
