import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.convert.remote import load, make, write_folder
from tests.model.llama import random_model, small_config


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder of random weights, n = 4, read only."""
    return make(tmp_path_factory.mktemp("exported"))[2]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder whose heads mostly agree: n = 3, trained to count modulo 12, noise at every fourth number."""
    config = small_config(vocab_size=12, vocab_multiple=4, n_layers=4, n_future_tokens=3, init_std=0.1)
    folder = tmp_path_factory.mktemp("trained")
    model = load(write_folder(folder, random_model(config, seed=0), config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        start = torch.randint(12, (16, 1), generator=generator)
        tokens = (start + torch.arange(15)) % 12
        noise = torch.randint(12, tokens.shape, generator=generator)
        tokens = torch.where(tokens % 4 == 0, noise, tokens)
        logits = model.multi_token_logits(tokens[:, :12])
        loss = sum(F.cross_entropy(logits[k].transpose(1, 2), tokens[:, k + 1 : k + 13]) for k in range(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fp64(tmp_path_factory):
    """(with remote code, stock), both in fp64."""
    folder = make(tmp_path_factory.mktemp("fp64"), dtype=torch.float64, init_std=0.15)[2]
    return load(folder, dtype=torch.float64), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def fp64_trained(trained):
    return load(trained, dtype=torch.float64), AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float64)
