"""Every shipped config of the paper's sizes: its recipe, a dry run, and that its layout fits and is a good one."""

from pathlib import Path

import pytest

import pretrain
from megamtp.config import load
from megamtp.model.cost import parameters
from megamtp.planner.devices import DEVICES
from megamtp.planner.estimate import estimate_on
from megamtp.planner.layouts import rank_layouts
from megamtp.training.run_config import RunConfig
from tests.training.tiny import write_corpus

CONFIGS = Path(pretrain.__file__).parent / "configs"

# arXiv:2404.19737, tables S13 and S14. By run: (batch in 2^20 tokens, steps, warm-up, context, final ratio).
RECIPES = {
    "small": (8, 10_850, 1000, 4096, 0.03),
    "6.7b": (8, 25_000, 2000, 4096, 0.03),
    "13b": (8, 25_000, 1000, 4096, 0.03),
    "6.7b_1t": (7, 136_240, 2000, 4096, 0.03),
    "6.7b_bytes": (12, 25_000, 2000, 8192, 0.03),
    "6.7b_natural": (8, 25_000, 2000, 4096, 0.10),
}
SIZES = {  # dim, layers, heads, GPUs that the config is planned for
    "0.3b": (1024, 18, 16, 8),
    "0.6b": (1280, 27, 20, 16),
    "1.3b": (2048, 24, 16, 32),
    "3b": (2560, 36, 20, 64),
    "6.7b": (4096, 32, 32, 128),
    "13b": (5120, 40, 40, 256),
}
RUNS = [*SIZES, "6.7b_1t", "6.7b_natural"]
NAMES = [f"{run}_n{n}" for run in RUNS for n in (1, 4)] + ["6.7b_bytes_n8"]
H100 = DEVICES["h100-80gb"]
EACH = pytest.mark.parametrize("name", NAMES)


def config_of(name) -> RunConfig:
    return load(RunConfig, CONFIGS / f"{name}.yaml", [])


def test_every_size_has_its_config():
    assert set(NAMES) <= {path.stem for path in CONFIGS.glob("*.yaml")}


@EACH
def test_recipe_is_the_papers(name):
    config = config_of(name)
    run, n = name.rsplit("_n", 1)
    size = run.split("_")[0]
    dim, n_layers, n_heads, gpus = SIZES[size]
    model = config.model
    assert (model.dim, model.n_layers, model.n_heads, model.n_future_tokens) == (dim, n_layers, n_heads, int(n))
    assert model.vocab_size == (257 if "bytes" in name else 32_000)
    assert model.replicated_unembedding == ("bytes" in name)
    if "bytes" in name:  # blocks, tables of 384 rows for the embedding and each head, the norm
        blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
        assert parameters(model).total == blocks + (1 + 8) * 384 * 4096 + 4096
    else:
        assert parameters(model).total / 1e9 == pytest.approx(float(size[:-1]), rel=0.1)
    batch, steps, warmup, context, ratio = RECIPES[run if run in RECIPES else "small"]
    training, schedule, optimizer = config.training, config.schedule, config.optimizer
    assert training.global_batch_size * config.data.seq_len == batch * 2**20
    assert (training.steps, schedule.warmup_steps, config.data.seq_len) == (steps, warmup, context)
    assert schedule.final_ratio == ratio and schedule.decay_steps is None
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip) == (
        3e-4,
        0.9,
        0.95,
        0.1,
        1.0,
    )
    assert training.precision == "bf16" and config.run_dir == f"runs/{name}"
    assert f"{gpus} GPUs of 80 GB" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Token ids below 250, so that words and bytes are both among the vocabularies; no tokenizer made them."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("train", "validation")):
        write_corpus(folder / name, n_documents=3000, seed=seed, vocab=250)
    return folder


@EACH
def test_dry_run(name, corpora, monkeypatch, capsys):
    recipe, gpus = planned(name)
    for variable, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", gpus)):
        monkeypatch.setenv(variable, str(value))
    data = ["--data.train", str(corpora / "train"), "--data.validation", str(corpora / "validation")]
    config = CONFIGS / f"{name}.yaml"
    assert pretrain.main([str(config), "--dry-run", *data, "--data.tokenizer", "null"]) == 0
    printed = capsys.readouterr().out
    tokens = recipe.training.steps * recipe.training.global_batch_size * recipe.data.seq_len
    assert f"tokens of the whole run: {tokens:,}" in printed
    assert f"{gpus} ranks = TP {recipe.parallel.tensor} x PP {recipe.parallel.pipeline}" in printed


def planned(name) -> tuple[RunConfig, int]:
    return config_of(name), SIZES[name.split("_")[0]][3]


@EACH
def test_layout_fits(name):
    """On the number of GPUs that it is planned for, with room to spare."""
    estimate = estimate_on(*planned(name), H100)
    assert estimate.memory.total < 0.85e9 * H100.memory_gb


@pytest.mark.parametrize("name", [f"{size}_n4" for size in SIZES] + ["6.7b_bytes_n8"])
def test_hardly_any_layout_is_faster(name):
    config, gpus = planned(name)
    own, (best,) = estimate_on(config, gpus, H100), rank_layouts(config, gpus, H100, keep=1).best
    assert best.step.total <= own.step.total * (1 + 1e-9)
    assert own.step.total < 1.06 * best.step.total


def test_a_config_needs_its_data():
    with pytest.raises(SystemExit) as ended:
        pretrain.main([str(CONFIGS / "0.3b_n4.yaml"), "--dry-run", "--data.train", "no/such/data"])
    assert ended.value.code == 2
